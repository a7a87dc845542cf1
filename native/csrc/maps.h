// What the passes over the feature map read and write besides the map. z = za (x - shift) + zb is the map after the
// norm and the channel gate, with za, zb per sample and channel.
#pragma once

#include "setting.h"

namespace {

// Turns flags into types, so that a kernel is compiled for each combination: choose(f, a, b) calls
// f(std::bool_constant<a>, std::bool_constant<b>).
template <class F>
INLINE void choose(const F& f, bool a) {
  a ? f(std::true_type{}) : f(std::false_type{});
}
template <class F, class... Rest>
INLINE void choose(const F& f, bool a, Rest... rest) {
  if (a)
    choose([&](auto... more) { f(std::true_type{}, more...); }, rest...);
  else
    choose([&](auto... more) { f(std::false_type{}, more...); }, rest...);
}

template <class A>
struct Scale {
  const A *za, *zb;  // (N, C)
  const A* shift;    // (C)

  // The values of U channels from c on; nc is the plane of the first one.
  template <int U>
  INLINE void take(int64_t nc, int64_t c, A* a, A* b, A* mu) const {
    unroll<U>([&](auto u) FLAT { a[u] = za[nc + u], b[u] = zb[nc + u], mu[u] = shift[c + u]; });
  }
};

// Pass C.
template <class T>
struct Output {
  const T* shortcut;     // null if there is none
  const Acc<T> *sa, *sb; // (C): sa shortcut + sb is added; null if the shortcut is added as it is
  T* out;
  const Acc<T>* open;    // Ms (N, L), null if there is no spatial gate
  bool relu;
};

enum class Added { nothing, plain, normed };

// Calls f with the options of pass C as types: the ReLU, the spatial gate, and what is added.
template <class F, class T>
INLINE void choose_added(const F& f, const Output<T>& to) {
  auto with = [&](auto added) { choose([&](auto... rest) { f(rest..., added); }, to.relu, to.open); };
  if (to.sa) with(std::integral_constant<Added, Added::normed>{});
  else if (to.shortcut) with(std::integral_constant<Added, Added::plain>{});
  else with(std::integral_constant<Added, Added::nothing>{});
}

// Pass 1. q0, q1 and first are the spatial descriptor and its argmax, recomputed.
template <class T>
struct Incoming {
  using A = Acc<T>;
  const T *grad, *out;  // out is read only for the ReLU
  T* g;                 // null if not wanted
  const A* open;        // Ms (N, L), null if there is no spatial gate, as are the next four
  A *d_open, *q0, *q1;  // (N, L)
  Index<A>* first;      // (N, L)
  A *P, *Q;             // (N, chunks, C): sums over the pixels of g Ms and of g Ms (x - mu)
  bool relu;
};

// Pass 3: dx = scale (g Ms + d1 + [c is first] d0) + constant + slope (x - mu) + [p = k] peak.
template <class T>
struct Outgoing {
  using A = Acc<T>;
  const T* g;
  T* dx;
  const A* open;                     // Ms (N, L), null if there is no spatial gate, as are the next three
  const A *d0, *d1;                  // (N, L)
  const Index<A>* first;             // (N, L)
  const A *scale, *constant, *peak;  // (N, C); peak is null without a max pool
  const int32_t* k;                  // (N, C)
  const A* slope;                    // (C), null if dx does not depend on x
};

}  // namespace
