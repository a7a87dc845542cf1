// The channel gate on vectors of (N, C):
//   d = a (pooled x - shift) + b        descriptors, average then maximum
//   h = relu(W1 d + b1)                 hidden, summed over the pools
//   Mc = gain sigmoid(W2 h + pools b2)
#pragma once

#include "setting.h"

namespace {

template <class T>
struct Gate {
  using A = Acc<T>;
  using V = Vec<A>;

  const Setting<T>& set;
  const Channel& part;
  int64_t N, C, hidden, pools;
  Read<A> w1, b1, w2, b2;
  Buffer<A> descriptor;  // (N, pools, C)
  Buffer<A> before;      // (N, pools, hidden): before the rectifier
  Buffer<A> sum;         // (N, hidden)

  explicit Gate(const Setting<T>& s)
      : set(s),
        part(s.block.channel),
        N(s.N),
        C(s.C),
        hidden(part.hidden),
        pools(part.avg + part.max),
        w1(part.w1, C * hidden),
        b1(part.b1, hidden),
        w2(part.w2, C * hidden),
        b2(part.b2, C),
        descriptor(N * pools * C),
        before(N * pools * hidden),
        sum(N * hidden) {}

  void describe(int64_t n, const Affine<A>& norm, const A* m, const T* e) {
    A* d = descriptor + n * pools * C;
    walk<A>(C, [&](int64_t c, auto lanes) {
      V a = load(norm.a.get() + c, lanes), shift = load(norm.shift.get() + c, lanes), b = load(norm.b.get() + c, lanes);
      if (part.avg) store(d + c, a * (load(m + n * C + c, lanes) - shift) + b, lanes);
      if (part.max) store(d + (pools - 1) * C + c, a * (load(e + n * C + c, lanes) - shift) + b, lanes);
    });
  }

  // Units of LANES hidden rows, for samples [n, n_end).
  void hide(int64_t unit, int64_t n, int64_t n_end) {
    int64_t at = unit * LANES<A>, count = least(LANES<A>, hidden - at);
    for (; n < n_end; n++) {
      V both{};
      V bias = load_some(b1 + at, count);
      for (int64_t q = 0; q < pools; q++) {
        V t = dots(w1 + at * C, count, descriptor + (n * pools + q) * C, C) + bias;
        store_some(before + (n * pools + q) * hidden + at, t, count);
        both += rectify<A>(t);
      }
      store_some(sum + n * hidden + at, both, count);
    }
  }

  // Units of LANES channels.
  void open(int64_t unit, int64_t n, int64_t n_end, A* gate) {
    int64_t at = unit * LANES<A>, count = least(LANES<A>, C - at);
    V bias = load_some(b2 + at, count) * A(pools);
    for (; n < n_end; n++) {
      V logit = dots(w2 + at * hidden, count, sum + n * hidden, hidden) + bias;
      store_some(gate + n * C + at, gate_of<A>(logit, A(part.gain)), count);
    }
  }

  int64_t hidden_units() const { return up(hidden, LANES<A>); }
  int64_t open_units() const { return up(C, LANES<A>); }

  void all(const Affine<A>& norm, const A* m, const T* e, A* gate) {
    set.parallel(N, [&](int64_t n, int64_t end) { for (; n < end; n++) describe(n, norm, m, e); });
    set.parallel(hidden_units(), [&](int64_t u, int64_t end) { for (; u < end; u++) hide(u, 0, N); });
    set.parallel(open_units(), [&](int64_t u, int64_t end) { for (; u < end; u++) open(u, 0, N, gate); });
  }

  void sample(int64_t n, const Affine<A>& norm, const A* m, const T* e, A* gate) {
    describe(n, norm, m, e);
    for (int64_t u = 0; u < hidden_units(); u++) hide(u, n, n + 1);
    for (int64_t u = 0; u < open_units(); u++) open(u, n, n + 1, gate);
  }

  // The gradients, given dl (N, C) of the logits: of the descriptors, and of every parameter that is asked for.
  // `before` and `sum` are those of the forward.
  void backward(const A* dl, A* d_descriptor, A* dw1, A* db1, A* dw2, A* db2) {
    Buffer<A> dh(N * pools * hidden);
    set.parallel(hidden_units(), [&](int64_t u, int64_t end) { for (; u < end; u++) to_hidden(u, dl, dh); });
    set.parallel(open_units(), [&](int64_t u, int64_t end) {
      for (; u < end; u++) {
        to_descriptor(u, dh, d_descriptor);
        second_layer(u, dl, dw2, db2);
      }
    });
    set.parallel(hidden, [&](int64_t h, int64_t end) { for (; h < end; h++) first_layer(h, dh, dw1, db1); });
  }

 private:
  static constexpr int64_t GROUP = 8;  // samples that share one look at a weight

  static INLINE V load_some(const A* p, int64_t count) {
    return count == LANES<A> ? load(p) : load(p, Part{int(count)});
  }
  static INLINE void store_some(A* p, V v, int64_t count) {
    count == LANES<A> ? store(p, v) : store(p, v, Part{int(count)});
  }

  // Lane r: row r of w (count rows of `length`) times v.
  static V dots(const A* w, int64_t count, const A* v, int64_t length) {
    V sums[LANES<A>] = {};
    if (count == LANES<A>) {
      walk<A>(length, [&](int64_t i, auto lanes) {
        V t = load(v + i, lanes);
        for (int r = 0; r < LANES<A>; r++) sums[r] += load(w + r * length + i, lanes) * t;
      });
    } else {
      for (int r = 0; r < count; r++)
        walk<A>(length, [&](int64_t i, auto lanes) { sums[r] += load(w + r * length + i, lanes) * load(v + i, lanes); });
    }
    return fold_sum<A>(sums);
  }

  // dh[n, pool, h] = (before > 0) sum_c dl[n, c] W2[c, h], for LANES hidden units.
  void to_hidden(int64_t unit, const A* dl, A* dh) {
    int64_t at = unit * LANES<A>, count = least(LANES<A>, hidden - at);
    for (int64_t n = 0; n < N; n += GROUP) {
      int64_t some = least(GROUP, N - n);
      V acc[GROUP] = {};
      for (int64_t c = 0; c < C; c++) {
        V w = load_some(w2 + c * hidden + at, count);
        for (int64_t g = 0; g < some; g++) acc[g] += w * dl[(n + g) * C + c];
      }
      for (int64_t g = 0; g < some; g++)
        for (int64_t q = 0; q < pools; q++) {
          int64_t i = ((n + g) * pools + q) * hidden + at;
          store_some(dh + i, load_some(before + i, count) <= V{} ? V{} : acc[g], count);
        }
    }
  }

  // d_descriptor[n, pool, c] = sum_h dh[n, pool, h] W1[h, c], for LANES channels.
  void to_descriptor(int64_t unit, const A* dh, A* d_descriptor) {
    int64_t at = unit * LANES<A>, count = least(LANES<A>, C - at), all = N * pools;
    for (int64_t n = 0; n < all; n += GROUP) {
      int64_t some = least(GROUP, all - n);
      V acc[GROUP] = {};
      for (int64_t h = 0; h < hidden; h++) {
        V w = load_some(w1 + h * C + at, count);
        for (int64_t g = 0; g < some; g++) acc[g] += w * dh[(n + g) * hidden + h];
      }
      for (int64_t g = 0; g < some; g++) store_some(d_descriptor + (n + g) * C + at, acc[g], count);
    }
  }

  // dW2[c, :] = sum_n dl[n, c] h[n, :] and db2[c] = pools sum_n dl[n, c], for LANES channels.
  void second_layer(int64_t unit, const A* dl, A* dw2, A* db2) {
    for (int64_t c = unit * LANES<A>; c < least(C, (unit + 1) * LANES<A>); c++) {
      A bias = 0;
      for (int64_t n = 0; n < N; n++) bias += dl[n * C + c];
      if (db2) db2[c] = bias * A(pools);
      walk<A>(hidden, [&](int64_t h, auto lanes) {
        V acc{};
        for (int64_t n = 0; n < N; n++) acc += load(sum + n * hidden + h, lanes) * dl[n * C + c];
        store(dw2 + c * hidden + h, acc, lanes);
      });
    }
  }

  // dW1[h, :] = sum_{n, pool} dh[n, pool, h] d[n, pool, :] and db1[h] = sum_{n, pool} dh[n, pool, h].
  void first_layer(int64_t h, const A* dh, A* dw1, A* db1) {
    A bias = 0;
    for (int64_t n = 0; n < N * pools; n++) bias += dh[n * hidden + h];
    if (db1) db1[h] = bias;
    walk<A>(C, [&](int64_t c, auto lanes) {
      V acc{};
      for (int64_t n = 0; n < N * pools; n++) acc += load(descriptor + n * C + c, lanes) * dh[n * hidden + h];
      store(dw1 + h * C + c, acc, lanes);
    });
  }
};

}  // namespace
