// Pass A: one read of x gives, per sample and channel, the mean, the centred second moment M2 and one extremum
// with its first index: the maximum if gamma > 0, the minimum if gamma < 0, the first pixel if gamma = 0 (every
// pixel is then a tie).
#pragma once

#include "maps.h"

namespace {

template <class T>
struct Pool {
  using A = Acc<T>;
  using V = Vec<A>;

  const Setting<T>& set;
  const T* x;
  const A* sign;  // (C): 1, -1 or 0
  A *m, *m2;      // (N, C); m2 null if not wanted
  T* e;           // (N, C)
  int32_t* k;     // (N, C), null if not wanted
  // (N, chunks, C), only if a pixel's channels are adjacent: sums of v - pivot and of its square, and the
  // largest sign v with its pixel. Without moments the pivot is 0.
  Buffer<A> pivots, sums, squares, bests;
  Buffer<Index<A>> firsts;

  Pool(const Setting<T>& s, const T* x, const A* sign, A* m, A* m2, T* e, int32_t* k)
      : set(s), x(x), sign(sign), m(m), m2(m2), e(e), k(k) {
    if (!s.block.rows) return;
    int64_t count = s.N * s.chunks * s.C;
    for (Buffer<A>* part : {&sums, &bests}) part->resize(count);
    for (Buffer<A>* part : {&pivots, &squares}) part->resize(m2 ? count : 0);
    firsts.resize(k ? count : 0);
  }

  // The whole batch, in all threads.
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
  // --- NCHW: a plane is contiguous ---

  int64_t units() const { return up(set.C, LANES<A>); }

  void planes(int64_t unit) {
    int64_t c = unit % units() * LANES<A>, nc = unit / units() * set.C + c, count = least(LANES<A>, set.C - c);
    if (set.L <= SMALL && count == LANES<A>) {
      small_planes(nc);
    } else {
      for (int64_t i = 0; i < count; i++) plane(nc + i);
    }
  }

  // LANES planes that fit into L1 together: the lanes of their sums are folded for all planes at once.
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
    if (any<A>((mean != mean) | (top != top) | (flip == V{}))) {
      for (int r = 0; r < LANES<A>; r++) finish(nc + r, best[r]);
      return;
    }
    store(e + nc, top * flip);
    if (!k) return;
    Int<A> where[LANES<A>];
    ROLLED for (int r = 0; r < LANES<A>; r++) {
      Int<A> last = splat_index<A>(set.L), at = last;
      V wanted = splat(best[r] * s[r]);
      walk<A>(set.L, [&](int64_t i, auto part) FLAT {
        Int<A> here = iota<A>() + splat_index<A>(i);
        here = load(p + r * set.L + i, part) == wanted ? here : last;
        at = here < at ? here : at;
      });
      where[r] = at;
    }
    Int<A> found = fold<A>(where, [](Int<A> a, Int<A> b) { return b < a ? b : a; });
    store_saved<A>(k + nc, found == splat_index<A>(set.L) ? Int<A>{} : found, Whole{});
  }

  void plane(int64_t nc) {
    const T* p = x + nc * set.L;
    A s = sign[nc % set.C], sum = 0, best = -INFINITY;
    Moments parts;
    constexpr int64_t TILE = 256 * LANES<A>;  // 64 values per partial sum, and still in L1 for the second read
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
      if (std::isfinite(parts.mean)) m[nc] = A(parts.mean);  // the more accurate one
    }
    finish(nc, best);
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

  // The moments of a tile, from the deviations from `centre`, which is its mean up to rounding.
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

  // e and k of a plane, given the largest sign v.
  void finish(int64_t nc, A best) {
    const T* p = x + nc * set.L;
    if (odd(nc, best, p, 1)) return;
    A value = best * sign[nc % set.C];
    from_float(value, e + nc);
    if (k) k[nc] = int32_t(find(p, value));
  }

  // e and k if every pixel is a tie, or if one is NaN, which `larger` drops and eager torch returns.
  bool odd(int64_t nc, A best, const T* first, int64_t stride) {
    if (m[nc] != m[nc]) {
      for (int64_t p = 0; p < set.L; p++) {
        A v = to_float(first[p * stride]);
        if (v != v) best = v;
      }
    }
    if (sign[nc % set.C] != 0 && best == best) return false;
    e[nc] = first[0];
    if (best != best) from_float(best, e + nc);
    if (k) k[nc] = 0;
    return true;
  }

  // The first pixel of a plane that equals `value`; 0 if none does.
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

  // --- channels_last: the channels of a pixel are adjacent ---

  static constexpr int64_t GROUP = 8;  // pixels per update of the sums, to reduce rounding errors

  void rows(int64_t unit) {
    choose([&](auto moments, auto index) { rows<moments, index>(unit); }, m2, k);
  }

  template <bool MOMENTS, bool INDEX>
  void rows(int64_t unit) {
    int64_t n = unit / set.chunks, i = unit % set.chunks, count = set.pixels(i), at = i * set.chunk, C = set.C;
    const T* p = x + (n * set.L + at) * C;
    int64_t q = count < GROUP ? 1 : GROUP;
    q == 1 ? group<1, MOMENTS, INDEX, true>(unit, p, at) : group<GROUP, MOMENTS, INDEX, true>(unit, p, at);
    for (; q + GROUP <= count; q += GROUP) group<GROUP, MOMENTS, INDEX, false>(unit, p + q * C, at + q);
    for (; q < count; q++) group<1, MOMENTS, INDEX, false>(unit, p + q * C, at + q);
  }

  // G pixels. The mean of the first group is the pivot, which only the moments need.
  template <int G, bool MOMENTS, bool INDEX, bool FIRST>
  INLINE void group(int64_t unit, const T* p, int64_t pixel) {
    int64_t C = set.C, at = unit * C;
    walk<A>(C, [&](int64_t c, auto part) FLAT {
      V pivot{}, sum{}, square{}, before{}, squares_before{}, flip = load(sign + c, part), best = splat(A(-INFINITY));
      Int<A> first = splat_index<A>(pixel);
      if constexpr (FIRST) {
        if constexpr (MOMENTS) {
          for (int g = 0; g < G; g++) pivot += load(p + g * C + c, part);
          pivot /= A(G);
          store(pivots + at + c, pivot, part);
        }
      } else {
        before = load(sums + at + c, part), best = load(bests + at + c, part);
        if constexpr (MOMENTS) pivot = load(pivots + at + c, part), squares_before = load(squares + at + c, part);
        if constexpr (INDEX) first = load_index<A>(firsts + at + c, part);
      }
      for (int g = 0; g < G; g++) {
        // The hardware does not prefetch several rows at once. Into L2, since in L1 rows a power of two apart evict
        // each other.
        __builtin_prefetch(p + (g + G) * C + c, 0, 2);
        V v = load(p + g * C + c, part), candidate = v * flip;
        if constexpr (INDEX) first = candidate > best ? splat_index<A>(pixel + g) : first;
        best = larger(best, candidate);
        if constexpr (MOMENTS) v -= pivot, square += v * v;
        sum += v;
      }
      store(sums + at + c, before + sum, part);
      if constexpr (MOMENTS) store(squares + at + c, squares_before + square, part);
      store(bests + at + c, best, part);
      if constexpr (INDEX) store_index<A>(firsts + at + c, first, part);
    });
  }

  // Merges the chunks of channels [from, to) of a sample, in order.
  void merge(int64_t n, int64_t from, int64_t to) {
    walk<double>(to - from, [&](int64_t c, auto part) { merge_moments(n, from + c, part); });
    walk<A>(to - from, [&](int64_t c, auto part) { merge_bests(n, from + c, part); });
  }

  // As `Moments::merge`, with the same weights for all channels.
  template <class P>
  INLINE void merge_moments(int64_t n, int64_t c, P part) {
    using D = Vec<double>;
    D mean{}, square{}, sum{};
    double all = 0, size = double(set.L);
    for (int64_t i = 0; i < set.chunks; i++) {
      int64_t at = (n * set.chunks + i) * set.C + c;
      double count = double(set.pixels(i)), before = all;
      D rest = widened(sums + at, part), centre = rest / count;
      if (m2) centre += widened(pivots + at, part);
      sum += centre * count;
      if (!m2) continue;
      D delta = centre - mean;
      all += count;
      square += widened(squares + at, part) - rest * rest / count + delta * delta * (before * count / all);
      mean += delta * (count / all);
    }
    int64_t nc = n * set.C + c;
    store_few(m + nc, narrowed<A>(sum) / A(size), part);
    if (m2) store_few(m2 + nc, narrowed<A>(square < 0.0 ? D{} : square), part);
    if (!any<double>(sum - sum != D{})) return;
    for (int l = 0; l < LANES<double> && c + l < set.C; l++)
      if (!std::isfinite(sum[l])) m[nc + l] = plain_mean(n, c + l);
  }

  // With a pivot, Inf gives NaN where the plain sum is Inf.
  A plain_mean(int64_t n, int64_t c) const {
    A sum = 0;
    for (int64_t p = 0; p < set.L; p++) sum += to_float(x[(n * set.L + p) * set.C + c]);
    return sum / A(set.L);
  }

  template <class P>
  INLINE void merge_bests(int64_t n, int64_t c, P part) {
    int64_t nc = n * set.C + c;
    V best = splat(A(-INFINITY));
    Int<A> first{};
    for (int64_t i = 0; i < set.chunks; i++) {
      int64_t at = (n * set.chunks + i) * set.C + c;
      V candidate = load(bests + at, part);
      if (k) first = candidate > best ? load_index<A>(firsts + at, part) : first;
      best = larger(best, candidate);
    }
    V flip = load(sign + c, part), mean = load(m + nc, part);
    store(e + nc, best * flip, part);
    if (k) store_saved<A>(k + nc, first, part);
    if (!any<A>((mean != mean) | (keep(flip, part, A(1)) == V{}))) return;
    for (int l = 0; l < LANES<A> && c + l < set.C; l++) odd(nc + l, best[l], x + n * set.L * set.C + c + l, set.C);
  }
};

}  // namespace
