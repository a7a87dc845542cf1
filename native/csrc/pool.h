// Pass A: one read of x gives, per sample and channel, the mean, the centred second moment M2 and one extremum
// with its first index: the maximum where gamma >= 0, the minimum where gamma < 0, the first pixel where
// gamma = 0 (every pixel is then a tie).
#pragma once

#include "setting.h"

namespace {

template <class T>
struct Pool {
  using A = Acc<T>;
  using V = Vec<A>;

  const Setting<T>& set;
  const T* x;
  const A* sign;  // (C): 1, -1 or 0
  A *m, *m2;      // (N, C); m2 null where not wanted
  T* e;           // (N, C)
  int32_t* k;     // (N, C), null where not wanted
  // (N, chunks, C), only where a pixel's channels are adjacent:
  Buffer<double> parts_mean;
  Buffer<A> parts_m2, parts_best;
  Buffer<Index<A>> parts_group;

  Pool(const Setting<T>& s, const T* x, const A* sign, A* m, A* m2, T* e, int32_t* k)
      : set(s), x(x), sign(sign), m(m), m2(m2), e(e), k(k) {
    if (!s.block.rows) return;
    int64_t count = s.N * s.chunks * s.C;
    parts_mean.resize(count);
    parts_m2.resize(m2 ? count : 0);
    parts_best.resize(count);
    parts_group.resize(count);
  }

  // The whole batch, by all threads.
  void all() {
    if (!set.block.rows) {
      set.parallel(set.N * units(), [&](int64_t i, int64_t end) { for (; i < end; i++) planes(i); });
    } else {
      set.parallel(set.N * set.chunks, [&](int64_t i, int64_t end) { for (; i < end; i++) rows(i); });
      int64_t cut = 64, cuts = up(set.C, cut);
      set.parallel(set.N * cuts, [&](int64_t i, int64_t end) {
        for (; i < end; i++) merge(i / cuts, i % cuts * cut, least(set.C, (i % cuts + 1) * cut));
      });
    }
  }

  void sample(int64_t n) {
    if (!set.block.rows) {
      for (int64_t i = 0; i < units(); i++) planes(n * units() + i);
    } else {
      for (int64_t i = 0; i < set.chunks; i++) rows(n * set.chunks + i);
      merge(n, 0, set.C);
    }
  }

 private:
  // --- NCHW: a plane lies together ---

  int64_t units() const { return up(set.C, LANES<A>); }

  void planes(int64_t unit) {
    int64_t c = unit % units() * LANES<A>, nc = unit / units() * set.C + c, count = least(LANES<A>, set.C - c);
    if (set.L <= SMALL && count == LANES<A>) {
      small_planes(nc);
    } else {
      for (int64_t i = 0; i < count; i++) plane(nc + i);
    }
  }

  // LANES planes that fit into L1 together: what is summed within each is folded over all of them at once.
  static constexpr int64_t SMALL = 2048 / sizeof(A);

  void small_planes(int64_t nc) {
    const T* p = x + nc * set.L;
    const A* s = sign + nc % set.C;
    A best[LANES<A>], size = A(set.L);
    V first[LANES<A>], second[LANES<A>];
    ROLLED for (int r = 0; r < LANES<A>; r++) {
      V sum{}, top = splat(A(-INFINITY)), flip = splat(s[r]);
      walk<A>(set.L, [&](int64_t i, auto part) {
        V v = load(p + r * set.L + i, part);
        sum += v;
        top = larger(top, keep(v * flip, part, A(-INFINITY)));
      });
      first[r] = sum, second[r] = top;
    }
    V mean = fold_sum<A>(first) / size, top = fold_max<A>(second);
    store(m + nc, mean);
    store(best, top);
    if (m2) {
      ROLLED for (int r = 0; r < LANES<A>; r++) {
        V sum{}, square{}, centre = splat(m[nc + r]);
        walk<A>(set.L, [&](int64_t i, auto part) {
          V d = keep(load(p + r * set.L + i, part) - centre, part, A(0));
          sum += d;
          square += d * d;
        });
        first[r] = sum, second[r] = square;
      }
      V rest = fold_sum<A>(first), exact = mean + rest / size;
      store(m2 + nc, fold_sum<A>(second) - rest * rest / size);
      store(m + nc, exact - exact == V{} ? exact : mean);
    }
    V flip = load(s);
    bool plain = !k && !any<A>((mean != mean) | (top != top) | (flip == V{}));
    if (plain) store(e + nc, top * flip);
    else
      for (int r = 0; r < LANES<A>; r++) finish(nc + r, best[r], 0, set.L, 1);
  }

  void plane(int64_t nc) {
    const T* p = x + nc * set.L;
    A s = sign[nc % set.C], sum = 0, best = -INFINITY;
    Moments parts;
    constexpr int64_t TILE = 256 * LANES<A>;  // 64 values to a partial sum, and in L1 for the second look
    for (int64_t at = 0; at < set.L; at += TILE) {
      int64_t count = least(TILE, set.L - at);
      A part, top;
      sum_and_best(p + at, count, s, part, top);
      sum += part;
      best = top > best ? top : best;
      if (m2) parts.merge(around(p + at, count, part / A(count)));
    }
    m[nc] = sum / A(set.L);
    if (m2) {
      m2[nc] = A(parts.square);
      if (std::isfinite(parts.mean)) m[nc] = A(parts.mean);  // the more exact one
    }
    finish(nc, best, 0, set.L, 1);
  }

  static INLINE void sum_and_best(const T* p, int64_t count, A sign, A& sum, A& best) {
    constexpr int64_t STEP = 4 * LANES<A>;
    V s[4] = {}, b[4];
    for (V& v : b) v = splat(A(-INFINITY));
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP)
      for (int u = 0; u < 4; u++) {
        V v = load(p + i + u * LANES<A>);
        s[u] += v;
        b[u] = larger(b[u], v * sign);
      }
    walk<A>(count - i, [&](int64_t j, auto part) {
      V v = load(p + i + j, part);
      s[0] += v;
      b[0] = larger(b[0], keep(v * sign, part, A(-INFINITY)));
    });
    sum = total<A>((s[0] + s[1]) + (s[2] + s[3]));
    best = largest<A>(larger(larger(b[0], b[1]), larger(b[2], b[3])));
  }

  // The moments of a tile, by deviations from `centre`, which is its mean but for rounding.
  static INLINE Moments around(const T* p, int64_t count, A centre) {
    constexpr int64_t STEP = 4 * LANES<A>;
    V s[4] = {}, first[4] = {};
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP)
      for (int u = 0; u < 4; u++) {
        V d = load(p + i + u * LANES<A>) - centre;
        first[u] += d;
        s[u] += d * d;
      }
    walk<A>(count - i, [&](int64_t j, auto part) {
      V d = keep(load(p + i + j, part) - centre, part, A(0));
      first[0] += d;
      s[0] += d * d;
    });
    double rest = total<A>((first[0] + first[1]) + (first[2] + first[3]));
    double square = total<A>((s[0] + s[1]) + (s[2] + s[3])), n = double(count);
    return {n, centre + rest / n, square - rest * rest / n};
  }

  // e and k of (n, c), given the best of sign * x. Its first index lies in [from, from + count) pixels.
  void finish(int64_t nc, A best, int64_t from, int64_t count, int64_t stride) {
    int64_t n = nc / set.C, c = nc % set.C;
    const T* first = stride == 1 ? x + nc * set.L : x + n * set.L * set.C + c;
    A s = sign[c];
    if (m[nc] != m[nc]) {  // the maximum dropped a NaN, if there is one: eager has it
      for (int64_t p = 0; p < set.L; p++) {
        A v = to_float(first[p * stride]);
        if (v != v) best = v;
      }
    }
    if (s == 0 || best != best) {
      e[nc] = first[0];
      if (best != best) from_float(best, e + nc);
      if (k) k[nc] = 0;
      return;
    }
    from_float(best * s, e + nc);
    if (!k) return;
    int64_t index = 0;
    if (stride == 1) {
      index = find(first, best * s);
    } else {
      for (int64_t p = from; p < least(from + count, set.L); p++)
        if (A(to_float(first[p * stride])) * s == best) {
          index = p;
          break;
        }
    }
    k[nc] = int32_t(index);
  }

  // The first pixel of a plane that equals `value`; 0 where none does.
  int64_t find(const T* p, A value) const {
    constexpr int64_t STEP = 4 * LANES<A>;
    int64_t at = 0;
    for (; at + STEP <= set.L; at += STEP) {
      Int<A> hits{};
      for (int u = 0; u < 4; u++) hits |= load(p + at + u * LANES<A>) == value;
      if (any<A>(hits)) break;
    }
    for (; at < set.L; at++)
      if (A(to_float(p[at])) == value) return at;
    return 0;
  }

  // --- channels_last: the channels of a pixel lie together ---

  static constexpr int64_t GROUP = 8;  // pixels looked at together; the best remembers its group only

  void rows(int64_t unit) {
    int64_t n = unit / set.chunks, i = unit % set.chunks, count = set.pixels(i), C = set.C;
    const T* p = x + (n * set.L + i * set.chunk) * C;
    A* best = parts_best + unit * C;
    double* mean = parts_mean + unit * C;
    A* moment = m2 ? parts_m2 + unit * C : nullptr;
    Index<A>* where = parts_group + unit * C;
    Buffer<A> pivot(C), sum(C), square(C);
    walk<A>(C, [&](int64_t c, auto part) {
      V v{};
      int64_t some = least(GROUP, count);
      for (int64_t g = 0; g < some; g++) v += load(p + g * C + c, part);
      store(pivot + c, v / A(some), part);
      store(sum + c, V{}, part);
      store(square + c, V{}, part);
      store(best + c, splat(A(-INFINITY)), part);
      store_index<A>(where + c, Int<A>{}, part);
    });
    int64_t at = 0;
    for (; at + GROUP <= count; at += GROUP) group<GROUP>(p + at * C, pivot, sum, square, best, where, i * set.chunk + at);
    for (; at < count; at++) group<1>(p + at * C, pivot, sum, square, best, where, (i * set.chunk + at) / GROUP * GROUP);
    for (int64_t c = 0; c < C; c++) {
      double rest = sum[c];
      mean[c] = pivot[c] + rest / double(count);
      if (moment) moment[c] = A(square[c] - rest * rest / double(count));
    }
    for (int64_t c = 0; c < C; c++) {
      if (mean[c] - mean[c] == 0) continue;
      A plain = 0;  // about a pivot, Inf gives NaN where the plain sum is Inf
      for (int64_t q = 0; q < count; q++) plain += to_float(p[q * C + c]);
      mean[c] = plain / double(count);
    }
  }

  // Takes G pixels into the sums about the pivot, and their best.
  template <int64_t G>
  INLINE void group(const T* p, const A* pivot, A* sum, A* square, A* best, Index<A>* where, int64_t pixel) const {
    int64_t C = set.C;
    bool moment = m2;
    walk<A>(C, [&](int64_t c, auto part) {
      V centre = load(pivot + c, part), s = load(sign + c, part), b = splat(A(-INFINITY)), d1{}, d2{};
      for (int64_t g = 0; g < G; g++) {
        V v = load(p + g * C + c, part), d = v - centre;
        d1 += d;
        d2 += d * d;
        b = larger(b, v * s);
      }
      store(sum + c, load(sum + c, part) + d1, part);
      if (moment) store(square + c, load(square + c, part) + d2, part);
      V old = load(best + c, part);
      Int<A> better = b > old;
      store(best + c, better ? b : old, part);
      store_index<A>(where + c, better ? splat_index<A>(pixel) : load_index<A>(where + c, part), part);
    });
  }

  void merge(int64_t n, int64_t from, int64_t to) {
    int64_t C = set.C;
    for (int64_t c = from; c < to; c++) {
      Moments parts;
      A best = -INFINITY;
      double sum = 0;
      int64_t where = 0;
      for (int64_t i = 0; i < set.chunks; i++) {
        int64_t at = (n * set.chunks + i) * C + c;
        double count = double(set.pixels(i));
        sum += parts_mean[at] * count;
        if (parts_best[at] > best) {
          best = parts_best[at];
          where = parts_group[at];
        }
        if (m2) parts.merge({count, parts_mean[at], parts_m2[at]});
      }
      m[n * C + c] = A(sum) / A(set.L);
      if (m2) m2[n * C + c] = parts.square < 0 ? A(0) : A(parts.square);
      finish(n * C + c, best, where, GROUP, C);
    }
  }
};

}  // namespace
