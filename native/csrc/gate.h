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
  Buffer<A> before;      // (N, pools, hidden): before the ReLU
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

  // `unit` is a group of LANES hidden units, for samples [n, n_end).
  void hide(int64_t unit, int64_t n, int64_t n_end) {
    int64_t at = unit * LANES<A>, count = least(LANES<A>, hidden - at);
    V bias = load_some(b1 + at, count);
    products(w1 + at * C, count, descriptor, C, n * pools, n_end * pools,
             [&](int64_t i, V t) { store_some(before + i * hidden + at, t + bias, count); });
    for (; n < n_end; n++) {
      V both{};
      for (int64_t q = 0; q < pools; q++) both += rectify<A>(load_some(before + (n * pools + q) * hidden + at, count));
      store_some(sum + n * hidden + at, both, count);
    }
  }

  // `unit` is a group of LANES channels.
  void open(int64_t unit, int64_t n, int64_t n_end, A* gate) {
    int64_t at = unit * LANES<A>, count = least(LANES<A>, C - at);
    V bias = load_some(b2 + at, count) * A(pools);
    products(w2 + at * hidden, count, sum, hidden, n, n_end,
             [&](int64_t i, V t) { store_some(gate + i * C + at, gate_of<A>(t + bias, A(part.gain)), count); });
  }

  int64_t hidden_units() const { return up(hidden, LANES<A>); }
  int64_t open_units() const { return up(C, LANES<A>); }

  void all(const Affine<A>& norm, const A* m, const T* e, A* gate) {
    set.parallel(N, [&](int64_t n, int64_t end) { for (; n < end; n++) describe(n, norm, m, e); });
    described(gate);
  }

  // The gates of the batch, from the descriptors of all samples.
  void described(A* gate) {
    set.parallel(hidden_units(), [&](int64_t u, int64_t end) { for (; u < end; u++) hide(u, 0, N); });
    set.parallel(open_units(), [&](int64_t u, int64_t end) { for (; u < end; u++) open(u, 0, N, gate); });
  }

  void sample(int64_t n, const Affine<A>& norm, const A* m, const T* e, A* gate) {
    describe(n, norm, m, e);
    for (int64_t u = 0; u < hidden_units(); u++) hide(u, n, n + 1);
    for (int64_t u = 0; u < open_units(); u++) open(u, n, n + 1, gate);
  }

  // Given dl (N, C), the gradient of the logits: the gradients of the descriptors and of the parameters, of biases
  // only if wanted. `before` and `sum` must be those of the forward.
  void backward(const A* dl, A* d_descriptor, A* dw1, A* db1, A* dw2, A* db2) {
    Buffer<A> dh(N * pools * hidden);
    set.parallel(up(hidden, WIDE), [&](int64_t u, int64_t end) { for (; u < end; u++) to_hidden(u * WIDE, dl, dh); });
    set.parallel(up(C, WIDE), [&](int64_t u, int64_t end) {
      for (; u < end; u++) {
        to_descriptor(u * WIDE, dh, d_descriptor);
        second_layer(u * WIDE, dl, dw2, db2);
      }
    });
    set.parallel(up(hidden, GROUP), [&](int64_t u, int64_t end) {
      for (int64_t h = u * GROUP; h < least(hidden, end * GROUP);) {
        bool whole = h + GROUP <= hidden;
        whole ? first_layer<GROUP>(h, dh, dw1, db1) : first_layer<1>(h, dh, dw1, db1);
        h += whole ? GROUP : 1;
      }
    });
  }

 private:
  static constexpr int GROUP = 8;                // vectors per load of a weight
  static constexpr int64_t WIDE = 2 * LANES<A>;  // columns that are processed together

  static INLINE V load_some(const A* p, int64_t count) {
    return count == LANES<A> ? load(p) : load(p, Part{int(count)});
  }
  static INLINE void store_some(A* p, V v, int64_t count) {
    count == LANES<A> ? store(p, v) : store(p, v, Part{int(count)});
  }

  // Calls f(i, V) for the vectors [i, end) of `length` elements, adjacent in v. Lane r is row r of w times vector i;
  // lanes beyond the `count` rows repeat the last row.
  template <class F>
  static INLINE void products(const A* w, int64_t count, const A* v, int64_t length, int64_t i, int64_t end, F f) {
    for (; i + 4 <= end; i += 4) {
      V out[4];
      dots<4>(w, count, v + i * length, length, out);
      for (int g = 0; g < 4; g++) f(i + g, out[g]);
    }
    for (; i < end; i++) {
      V out;
      dots<1>(w, count, v + i * length, length, &out);
      f(i, out);
    }
  }

  // A tile of rows times G vectors at a time, so that each load serves several products.
  template <int G>
  static void dots(const A* w, int64_t count, const A* v, int64_t length, V* out) {
    constexpr int TILE = BYTES == 64 ? 4 : 2;  // TILE x 4 sums have to fit into the registers
    V sums[G][LANES<A>];
    ROLLED for (int r = 0; r < LANES<A>; r += TILE) {
      const A* row[TILE];
      V acc[TILE * G];
      unroll<TILE>([&](auto t) FLAT { row[t] = w + least(r + t, count - 1) * length; });
      unroll<TILE * G>([&](auto k) FLAT { acc[k] = V{}; });
      walk<A>(length, [&](int64_t i, auto lanes) FLAT {
        V in[G];
        unroll<G>([&](auto g) FLAT { in[g] = load(v + g * length + i, lanes); });
        unroll<TILE>([&](auto t) FLAT {
          V a = load(row[t] + i, lanes);
          unroll<G>([&](auto g) FLAT { acc[t * G + g] += a * in[g]; });
        });
      });
      unroll<TILE * G>([&](auto k) FLAT { sums[k % G][r + k / G] = acc[k]; });
    }
    for (int g = 0; g < G; g++) out[g] = fold_sum<A>(sums[g]);
  }

  // dh[n, pool, h] = (before > 0) sum_c dl[n, c] W2[c, h], for WIDE hidden units.
  void to_hidden(int64_t at, const A* dl, A* dh) {
    columns(w2 + at, hidden, least(WIDE, hidden - at), dl, C, N, [&](int64_t n, int64_t j, V sum, int64_t count) {
      for (int64_t q = 0; q < pools; q++) {
        int64_t i = (n * pools + q) * hidden + at + j;
        store_some(dh + i, load_some(before + i, count) <= V{} ? V{} : sum, count);
      }
    });
  }

  // d_descriptor[n, pool, c] = sum_h dh[n, pool, h] W1[h, c], for WIDE channels.
  void to_descriptor(int64_t at, const A* dh, A* d_descriptor) {
    columns(w1 + at, C, least(WIDE, C - at), dh, hidden, N * pools, [&](int64_t i, int64_t j, V sum, int64_t count) {
      store_some(d_descriptor + i * C + at + j, sum, count);
    });
  }

  // Multiplies `count` columns of w, whose rows are `step` apart, by each of `many` vectors of `rows` elements in v:
  // f(i, j, V, lanes) for vector i and the columns from j on.
  template <class F>
  static INLINE void columns(const A* w, int64_t step, int64_t count, const A* v, int64_t rows, int64_t many, F f) {
    if (count == WIDE) return some_columns<2>(w, step, LANES<A>, v, rows, many, 0, f);
    for (int64_t j = 0; j < count; j += LANES<A>)
      some_columns<1>(w + j, step, least(LANES<A>, count - j), v, rows, many, j, f);
  }

  template <int W, class F>
  static INLINE void some_columns(const A* w, int64_t step, int64_t count, const A* v, int64_t rows, int64_t many,
                                  int64_t j, F f) {
    int64_t i = 0;
    for (; i + GROUP <= many; i += GROUP) column<W, GROUP>(w, step, count, v + i * rows, rows, i, j, f);
    for (; i < many; i++) column<W, 1>(w, step, count, v + i * rows, rows, i, j, f);
  }

  template <int W, int G, class F>
  static INLINE void column(const A* w, int64_t step, int64_t count, const A* v, int64_t rows, int64_t i, int64_t j,
                            F f) {
    V acc[W * G];
    unroll<W * G>([&](auto k) FLAT { acc[k] = V{}; });
    for (int64_t r = 0; r < rows; r++) {
      V a[W];
      unroll<W>([&](auto b) FLAT { a[b] = load_some(w + r * step + b * LANES<A>, count); });
      unroll<W * G>([&](auto k) FLAT { acc[k] += a[k % W] * v[k / W * rows + r]; });
    }
    unroll<W * G>([&](auto k) FLAT { f(i + k / W, j + k % W * LANES<A>, acc[k], count); });
  }

  // dW2[c, :] = sum_n dl[n, c] h[n, :] and db2[c] = pools sum_n dl[n, c], for WIDE channels.
  void second_layer(int64_t at, const A* dl, A* dw2, A* db2) {
    for (int64_t c = at; c < least(C, at + WIDE); c++) {
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

  // dW1[h, :] = sum_{n, pool} dh[n, pool, h] d[n, pool, :] and db1[h] = sum_{n, pool} dh[n, pool, h], for H rows.
  template <int H>
  void first_layer(int64_t at, const A* dh, A* dw1, A* db1) {
    for (int64_t h = at; h < at + H; h++) {
      A bias = 0;
      for (int64_t n = 0; n < N * pools; n++) bias += dh[n * hidden + h];
      if (db1) db1[h] = bias;
    }
    walk<A>(C, [&](int64_t c, auto lanes) FLAT {
      V acc[H];
      unroll<H>([&](auto h) FLAT { acc[h] = V{}; });
      for (int64_t n = 0; n < N * pools; n++) {
        V d = load(descriptor + n * C + c, lanes);
        unroll<H>([&](auto h) FLAT { acc[h] += d * dh[n * hidden + at + h]; });
      }
      unroll<H>([&](auto h) FLAT { store(dw1 + (at + h) * C + c, acc[h], lanes); });
    });
  }
};

}  // namespace
