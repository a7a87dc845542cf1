// The passes over a channels_last map: the channels of a pixel are adjacent. A unit is a chunk of pixels.
#pragma once

#include "maps.h"

namespace {

template <class T>
struct Rows {
  using A = Acc<T>;
  using V = Vec<A>;

  const Setting<T>& set;
  const T* x;
  Scale<A> z;

  // Pixels are processed one by one, since memory that is read in order is prefetched. If the values per channel would
  // not stay in L1 from one pixel to the next, a few pixels are processed together.
  static constexpr int TOGETHER = BYTES == 64 ? 4 : 2;
  bool wide() const { return set.C * int64_t(sizeof(A)) > 4096; }

  // --- pass B ---

  void describe(int64_t unit, A* q0, A* q1) const {
    int64_t n = unit / set.chunks, begin = n * set.L + unit % set.chunks * set.chunk;
    int64_t end = begin + set.pixels(unit % set.chunks);
    for (int64_t p = begin; p < end; p += LANES<A>) {
      V top[LANES<A>] = {}, sum[LANES<A>] = {};
      int l = 0, count = int(least(LANES<A>, end - p));
      if (wide())
        for (; l + TOGETHER <= count; l += TOGETHER) describe_pixels<TOGETHER>(n, p + l, top + l, sum + l);
      for (; l < count; l++) describe_pixels<1>(n, p + l, top + l, sum + l);
      V highest = fold_max<A>(top), mean = fold_sum<A>(sum) / A(set.C);
      some(p, end, [&](auto part) {
        store(q0 + p, highest, part);
        store(q1 + p, mean, part);
      });
    }
  }

  // --- pass C: units [from, end) ---

  void write(int64_t from, int64_t end, const Output<T>& to) const {
    auto chunks = [&](auto relu, auto spatial, auto added) {
      for (int64_t unit = from; unit < end; unit++) write_chunk<relu, spatial, added>(unit, to);
    };
    choose_added(chunks, to);
  }

  // --- pass 1 ---

  void receive(int64_t unit, const Incoming<T>& to) const {
    choose([&](auto relu, auto spatial) { receive_chunk<relu, spatial>(unit, to); }, to.relu, to.open);
  }

  // --- pass 2: H (C) = sum over the pixels of w (x - mu) for a chunk ---

  void weigh(int64_t unit, const A* w, A* H) const {
    int64_t n = unit / set.chunks, begin = n * set.L + unit % set.chunks * set.chunk;
    int64_t end = begin + set.pixels(unit % set.chunks);
    for (int64_t c = 0; c < set.C; c++) H[c] = 0;
    int64_t p = begin;
    for (; p + 8 <= end; p += 8) weigh_pixels<8>(p, w, H);
    for (; p < end; p++) weigh_pixels<1>(p, w, H);
  }

  A pixel(int64_t n, int64_t c, int64_t p) const { return to_float(x[(n * set.L + p) * set.C + c]); }

  // --- pass 3 ---

  void send(int64_t unit, const Outgoing<T>& to) const {
    choose([&](auto spatial, auto batch, auto peak) { send_chunk<spatial, batch, peak>(unit, to); }, to.open,
           to.slope, to.peak);
  }

 private:
  // Calls f(Whole) or f(Part) for the pixels of [p, end) that fit into one vector.
  template <class F>
  static INLINE void some(int64_t p, int64_t end, F f) {
    end - p >= LANES<A> ? f(Whole{}) : f(Part{int(end - p)});
  }

  template <int U>
  INLINE void describe_pixels(int64_t n, int64_t p, V* top, V* sum) const {
    int64_t C = set.C;
    const A *za = z.za + n * C, *zb = z.zb + n * C;
    V best[U], all[U];
    for (int u = 0; u < U; u++) best[u] = splat(A(-INFINITY)), all[u] = V{};
    walk<A>(C, [&](int64_t c, auto part) {
      V a = load(za + c, part), b = load(zb + c, part), shift = load(z.shift + c, part);
      for (int u = 0; u < U; u++) {
        V t = a * (load(x + (p + u) * C + c, part) - shift) + b;
        best[u] = larger(best[u], keep(t, part, A(-INFINITY)));
        all[u] += keep(t, part, A(0));
      }
    });
    for (int u = 0; u < U; u++) top[u] = best[u], sum[u] = all[u];
  }

  template <bool RELU, bool SPATIAL, Added ADDED>
  void write_chunk(int64_t unit, const Output<T>& to) const {
    int64_t n = unit / set.chunks, begin = n * set.L + unit % set.chunks * set.chunk;
    int64_t end = begin + set.pixels(unit % set.chunks);
    // Always one at a time: if rows are a power of two apart, a store to one delays loads from the next.
    int64_t band = wide() ? 4096 / int64_t(sizeof(A)) : set.C;  // channels whose values stay in L1, see above
    for (int64_t c = 0; c < set.C; c += band)
      for (int64_t p = begin; p < end; p++) write_pixel<RELU, SPATIAL, ADDED>(n, p, c, least(band, set.C - c), to);
  }

  template <bool RELU, bool SPATIAL, Added ADDED>
  INLINE void write_pixel(int64_t n, int64_t p, int64_t from, int64_t count, const Output<T>& to) const {
    const A *za = z.za + n * set.C + from, *zb = z.zb + n * set.C + from, *shift = z.shift + from;
    const A *sa = nullptr, *sb = nullptr;
    if constexpr (ADDED == Added::normed) sa = to.sa + from, sb = to.sb + from;
    int64_t at = p * set.C + from;
    A open = SPATIAL ? to.open[p] : A(1);
    walk<A>(count, [&](int64_t c, auto part) {
      V v = load(za + c, part) * (load(x + at + c, part) - load(shift + c, part)) + load(zb + c, part);
      if constexpr (SPATIAL) v *= open;
      if constexpr (ADDED == Added::plain) v += load(to.shortcut + at + c, part);
      if constexpr (ADDED == Added::normed)
        v += load(sa + c, part) * load(to.shortcut + at + c, part) + load(sb + c, part);
      if constexpr (RELU) v = rectify<A>(v);
      store(to.out + at + c, v, part);
    });
  }

  // Per-pixel sums of LANES pixels, each a vector until they are folded.
  struct Sums {
    V d_open[LANES<A>], top[LANES<A>], sum[LANES<A>];
    Int<A> first[LANES<A>];
  };

  template <bool RELU, bool SPATIAL>
  void receive_chunk(int64_t unit, const Incoming<T>& to) const {
    int64_t n = unit / set.chunks, begin = n * set.L + unit % set.chunks * set.chunk;
    int64_t end = begin + set.pixels(unit % set.chunks), C = set.C;
    A *P = to.P + unit * C, *Q = to.Q + unit * C;
    for (int64_t c = 0; c < C; c++) P[c] = Q[c] = 0;
    for (int64_t p = begin; p < end; p += LANES<A>) {
      Sums sums;
      if (SPATIAL)
        for (int l = 0; l < LANES<A>; l++) {
          sums.d_open[l] = sums.sum[l] = V{};
          sums.top[l] = splat(A(-INFINITY));
          sums.first[l] = Int<A>{};
        }
      int l = 0, count = int(least(LANES<A>, end - p));
      if (wide())
        for (; l + TOGETHER <= count; l += TOGETHER) receive_pixels<TOGETHER, RELU, SPATIAL>(n, p, l, P, Q, sums, to);
      for (; l < count; l++) receive_pixels<1, RELU, SPATIAL>(n, p, l, P, Q, sums, to);
      if constexpr (SPATIAL) {
        V d_open = fold_sum<A>(sums.d_open), mean = fold_sum<A>(sums.sum) / A(C);
        fold_first(sums.top, sums.first);
        some(p, end, [&](auto part) {
          store(to.d_open + p, d_open, part);
          store(to.q0 + p, sums.top[0], part);
          store(to.q1 + p, mean, part);
          store_index<A>(to.first + p, sums.first[0], part);
        });
      }
    }
  }

  template <int U, bool RELU, bool SPATIAL>
  INLINE void receive_pixels(int64_t n, int64_t p, int l, A* P, A* Q, Sums& sums, const Incoming<T>& to) const {
    int64_t C = set.C, base = (p + l) * C;
    const A *za = z.za + n * C, *zb = z.zb + n * C;
    V d_open[U], top[U], sum[U];
    Int<A> first[U];
    A open[U];
    for (int u = 0; u < U; u++) {
      d_open[u] = sum[u] = V{};
      top[u] = splat(A(-INFINITY));
      first[u] = Int<A>{};
      open[u] = SPATIAL ? to.open[p + l + u] : A(1);
    }
    bool keeps = to.g;
    walk<A>(C, [&](int64_t c, auto part) {
      V a = load(za + c, part), b = load(zb + c, part), mu = load(z.shift + c, part);
      V sum_P{}, sum_Q{};
      Int<A> here = iota<A>() + splat_index<A>(c);
      for (int u = 0; u < U; u++) {
        int64_t o = base + u * C + c;
        V g = loaded(load(to.grad + o, part));
        if constexpr (RELU) {
          g = load(to.out + o, part) <= V{} ? V{} : g;
          if (keeps) store(to.g + o, g, part);
        }
        V d = load(x + o, part) - mu;
        if constexpr (SPATIAL) {
          V t = a * d + b;
          d_open[u] += g * t;
          g *= open[u];
          V candidate = keep(t, part, A(-INFINITY));
          Int<A> better = candidate > top[u];
          top[u] = better ? candidate : top[u];
          first[u] = better ? here : first[u];
          sum[u] += keep(t, part, A(0));
        }
        sum_P += g;
        sum_Q += g * d;
      }
      store(P + c, load(P + c, part) + sum_P, part);
      store(Q + c, load(Q + c, part) + sum_Q, part);
    });
    if constexpr (SPATIAL)
      for (int u = 0; u < U; u++) {
        sums.d_open[l + u] = d_open[u];
        sums.top[l + u] = top[u];
        sums.sum[l + u] = sum[u];
        sums.first[l + u] = first[u];
      }
  }

  // As `fold`, for the largest value with the smallest index.
  template <int BLOCK = LANES<A>>
  static INLINE void fold_first(V* top, Int<A>* first) {
    if constexpr (BLOCK > 1) {
      using All = std::make_integer_sequence<int, LANES<A>>;
      for (int i = 0; i < BLOCK / 2; i++) {
        V a = interleave<A, BLOCK, 0>(top[i], top[i + BLOCK / 2], All{});
        V b = interleave<A, BLOCK, BLOCK / 2>(top[i], top[i + BLOCK / 2], All{});
        Int<A> at = interleave<A, BLOCK, 0>(first[i], first[i + BLOCK / 2], All{});
        Int<A> bt = interleave<A, BLOCK, BLOCK / 2>(first[i], first[i + BLOCK / 2], All{});
        Int<A> better = (b > a) | ((b == a) & (bt < at));
        top[i] = better ? b : a;
        first[i] = better ? bt : at;
      }
      fold_first<BLOCK / 2>(top, first);
    }
  }

  template <int U>
  INLINE void weigh_pixels(int64_t p, const A* w, A* H) const {
    walk<A>(set.C, [&](int64_t c, auto part) {
      V sum{}, mu = load(z.shift + c, part);
      for (int u = 0; u < U; u++) {
        __builtin_prefetch(x + (p + U + u) * set.C + c, 0, 2);  // as in pass A
        sum += w[p + u] * (load(x + (p + u) * set.C + c, part) - mu);
      }
      store(H + c, load(H + c, part) + sum, part);
    });
  }

  template <bool SPATIAL, bool BATCH, bool PEAK>
  void send_chunk(int64_t unit, const Outgoing<T>& to) const {
    int64_t n = unit / set.chunks, from = unit % set.chunks * set.chunk, end = from + set.pixels(unit % set.chunks);
    int64_t p = from;
    if (wide())
      for (; p + TOGETHER <= end; p += TOGETHER) send_pixels<TOGETHER, SPATIAL, BATCH, PEAK>(n, p, to);
    for (; p < end; p++) send_pixels<1, SPATIAL, BATCH, PEAK>(n, p, to);
  }

  template <int U, bool SPATIAL, bool BATCH, bool PEAK>
  INLINE void send_pixels(int64_t n, int64_t p, const Outgoing<T>& to) const {
    int64_t C = set.C, map = n * set.L + p;
    walk<A>(C, [&](int64_t c, auto part) {
      V scale = load(to.scale + n * C + c, part), constant = load(to.constant + n * C + c, part), slope{}, mu{}, peak{};
      Int<A> k{}, here = iota<A>() + splat_index<A>(c);
      if constexpr (BATCH) slope = load(to.slope + c, part), mu = load(z.shift + c, part);
      if constexpr (PEAK) peak = load(to.peak + n * C + c, part), k = load_saved<A>(to.k + n * C + c, part);
      for (int u = 0; u < U; u++) {
        int64_t o = (map + u) * C + c;
        V v = load(to.g + o, part);
        if constexpr (SPATIAL) {
          V w = splat(to.d1[map + u]);
          w = here == splat_index<A>(to.first[map + u]) ? w + to.d0[map + u] : w;
          v = v * to.open[map + u] + w;
        }
        v = v * scale + constant;
        if constexpr (BATCH) v += slope * (load(x + o, part) - mu);
        if constexpr (PEAK) v = k == splat_index<A>(p + u) ? v + peak : v;
        store(to.dx + o, v, part);
      }
    });
  }
};

}  // namespace
