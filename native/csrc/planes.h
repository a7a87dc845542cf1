// The passes over an NCHW map: the pixels of a plane are adjacent. If a pass sums over channels, a unit is a chunk of
// pixels, and a few planes are processed together so that the per-pixel sums are accessed less often.
#pragma once

#include "maps.h"

namespace {

template <class T>
struct Planes {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int TOGETHER = BYTES == 64 ? 4 : 2;

  static constexpr int LIMIT = Setting<T>::PLANE_CHUNK;
  static constexpr int64_t BLOCK = 128;  // channels per partial sum, to reduce rounding errors

  const Setting<T>& set;
  const T* x;
  Scale<A> z;

  // --- pass B: the maximum and the mean of z over the channels, for a chunk ---

  void describe(int64_t unit, A* q0, A* q1) const {
    int64_t n = unit / set.chunks, at = unit % set.chunks * set.chunk, count = set.pixels(unit % set.chunks);
    A *top = q0 + n * set.L + at, *mean = q1 + n * set.L + at;
    switch (count < LANES<A> ? 0 : up(count, LANES<A>)) {
      case 1: return describe_few<1>(n, at, count, top, mean);
      case 2: return describe_few<2>(n, at, count, top, mean);
      case 3: return describe_few<3>(n, at, count, top, mean);
      case 4: return describe_few<4>(n, at, count, top, mean);
    }
    A sum[LIMIT] = {};
    for (int64_t p = 0; p < count; p++) top[p] = -INFINITY, mean[p] = 0;
    for (int64_t c = 0, end; c < set.C; c = end) {
      end = least(set.C, c + BLOCK);
      for (; c + 8 <= end; c += 8) channels<8>(n, c, at, count, top, sum);
      for (; c < end; c++) channels<1>(n, c, at, count, top, sum);
      flush(sum, mean, count);
    }
    for (int64_t p = 0; p < count; p++) mean[p] /= A(set.C);
  }

  // --- pass C: planes [from, end) ---

  void write(int64_t from, int64_t end, const Output<T>& to) const {
    auto planes = [&](auto relu, auto spatial, auto added) {
      for (int64_t nc = from; nc < end; nc++) plane<relu, spatial, added>(nc, to);
    };
    choose_added(planes, to);
  }

  // --- pass 1: a chunk ---

  void receive(int64_t unit, const Incoming<T>& to) const {
    choose([&](auto relu, auto spatial) { receive_chunk<relu, spatial>(unit, to); }, to.relu, to.open);
  }

  // --- pass 2: sum over the pixels of w (x - mu) for a plane ---

  A weigh(int64_t nc, const A* w) const {
    const T* p = x + nc * set.L;
    w += nc / set.C * set.L;
    A mu = z.shift[nc % set.C];
    constexpr int64_t STEP = 4 * LANES<A>;
    V sum[4] = {};
    int64_t i = 0;
    for (; i + STEP <= set.L; i += STEP)
      for (int u = 0; u < 4; u++)
        sum[u] += load(w + i + u * LANES<A>) * (load(p + i + u * LANES<A>) - mu);
    walk<A>(set.L - i, [&](int64_t j, auto part) { sum[0] += load(w + i + j, part) * (load(p + i + j, part) - mu); });
    return total<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  A pixel(int64_t n, int64_t c, int64_t p) const { return to_float(x[(n * set.C + c) * set.L + p]); }

  // --- pass 3: a plane ---

  void send(int64_t nc, const Outgoing<T>& to) const {
    choose([&](auto spatial, auto batch) { send_plane<spatial, batch>(nc, to); }, to.open, to.slope);
  }

 private:
  static INLINE void flush(A* part, A* total, int64_t count) {
    for (int64_t p = 0; p < count; p++) total[p] += part[p], part[p] = 0;
  }

  // `describe` for K vectors of pixels, of which the last two may overlap: all sums stay in registers.
  template <int K>
  void describe_few(int64_t n, int64_t at, int64_t count, A* top, A* mean) const {
    constexpr int U = 4;
    V best[K], all[K], sum[K];
    int64_t place[K];
    unroll<K>([&](auto k) FLAT {
      place[k] = least(k * LANES<A>, count - LANES<A>);
      best[k] = splat(A(-INFINITY)), all[k] = V{};
    });
    auto add = [&](int64_t c, auto many) FLAT {
      A za[U], zb[U], shift[U];
      z.template take<many>(n * set.C + c, c, za, zb, shift);
      unroll<K>([&](auto k) FLAT {
        V t[U] = {};
        unroll<many>([&](auto u) FLAT {
          t[u] = za[u] * (load(x + (n * set.C + c + u) * set.L + at + place[k]) - shift[u]) + zb[u];
          best[k] = larger(best[k], t[u]);
        });
        sum[k] += many == 1 ? t[0] : (t[0] + t[1]) + (t[2] + t[3]);
      });
    };
    for (int64_t c = 0, end; c < set.C; c = end) {
      end = least(set.C, c + BLOCK);
      unroll<K>([&](auto k) FLAT { sum[k] = V{}; });
      for (; c + U <= end; c += U) add(c, std::integral_constant<int, U>{});
      for (; c < end; c++) add(c, std::integral_constant<int, 1>{});
      unroll<K>([&](auto k) FLAT { all[k] += sum[k]; });
    }
    unroll<K>([&](auto k) FLAT {
      store(top + place[k], best[k]);
      store(mean + place[k], all[k] / A(set.C));
    });
  }

  template <int U>
  INLINE void channels(int64_t n, int64_t c, int64_t at, int64_t count, A* top, A* sum) const {
    const T* p = x + (n * set.C + c) * set.L + at;
    A za[U], zb[U], shift[U];
    z.template take<U>(n * set.C + c, c, za, zb, shift);
    walk<A>(count, [&](int64_t i, auto part) {
      V t[U];
      V best = load(top + i, part);
      for (int u = 0; u < U; u++) {
        t[u] = za[u] * (load(p + u * set.L + i, part) - shift[u]) + zb[u];
        best = larger(best, t[u]);
      }
      store(top + i, best, part);
      for (int width = U / 2; width; width /= 2)
        for (int u = 0; u < width; u++) t[u] += t[u + width];
      store(sum + i, load(sum + i, part) + t[0], part);
    });
  }

  template <bool RELU, bool SPATIAL, Added ADDED>
  INLINE void plane(int64_t nc, const Output<T>& to) const {
    int64_t c = nc % set.C, base = nc * set.L;
    A za = z.za[nc], zb = z.zb[nc], shift = z.shift[c];
    A sa = ADDED == Added::normed ? to.sa[c] : A(1), sb = ADDED == Added::normed ? to.sb[c] : A(0);
    const A* open = SPATIAL ? to.open + nc / set.C * set.L : nullptr;
    auto value = [&](int64_t i, auto part) FLAT {
      V v = za * (load(x + base + i, part) - shift) + zb;
      if constexpr (SPATIAL) v *= load(open + i, part);
      if constexpr (ADDED == Added::plain) v += load(to.shortcut + base + i, part);
      if constexpr (ADDED == Added::normed) v += sa * load(to.shortcut + base + i, part) + sb;
      if constexpr (RELU) v = rectify<A>(v);
      return v;
    };
    whole_vectors(to.out + base, value);
  }

  // Writes value(i, part) to the pixels of a plane. The last vector overlaps the one before it, since a partial store
  // costs more. Its value is computed first, since the plane may be one that is read.
  template <class F>
  INLINE void whole_vectors(T* to, F value) const {
    if (set.L < LANES<A> || set.L % LANES<A> == 0) {
      walk<A>(set.L, [&](int64_t i, auto part) FLAT { store(to + i, value(i, part), part); });
      return;
    }
    int64_t end = set.L - LANES<A>;
    V last = value(end, Whole{});
    for (int64_t i = 0; i < end; i += LANES<A>) store(to + i, value(i, Whole{}));
    store(to + end, last);
  }

  template <bool RELU, bool SPATIAL>
  void receive_chunk(int64_t unit, const Incoming<T>& to) const {
    int64_t n = unit / set.chunks, at = unit % set.chunks * set.chunk, count = set.pixels(unit % set.chunks);
    int64_t map = n * set.L + at;
    A d_open[LIMIT], sum[LIMIT];
    if (SPATIAL)
      for (int64_t p = 0; p < count; p++) {
        to.d_open[map + p] = to.q1[map + p] = d_open[p] = sum[p] = 0;
        to.q0[map + p] = -INFINITY, to.first[map + p] = 0;
      }
    for (int64_t c = 0, end; c < set.C; c = end) {
      end = least(set.C, c + BLOCK);
      A *P = to.P + unit * set.C, *Q = to.Q + unit * set.C;
      for (V p[LANES<A>], q[LANES<A>]; c + LANES<A> <= end; c += LANES<A>) {
        ROLLED for (int r = 0; r < LANES<A>; r += TOGETHER)
          receive_channels<TOGETHER, RELU, SPATIAL>(n, c + r, at, count, d_open, sum, p + r, q + r, to);
        store(P + c, fold_sum<A>(p));
        store(Q + c, fold_sum<A>(q));
      }
      for (V p, q; c < end; c++) {
        receive_channels<1, RELU, SPATIAL>(n, c, at, count, d_open, sum, &p, &q, to);
        P[c] = total<A>(p), Q[c] = total<A>(q);
      }
      if (!SPATIAL) continue;
      flush(d_open, to.d_open + map, count);
      flush(sum, to.q1 + map, count);
    }
    if (SPATIAL)
      for (int64_t p = map; p < map + count; p++) to.q1[p] /= A(set.C);
  }

  // U channels from c on. Writes P and Q, whose lanes are still to be summed.
  template <int U, bool RELU, bool SPATIAL>
  INLINE void receive_channels(int64_t n, int64_t c, int64_t at, int64_t count, A* d_opens, A* sums, V* P, V* Q,
                               const Incoming<T>& to) const {
    int64_t base = (n * set.C + c) * set.L + at, map = n * set.L + at;
    A za[U], zb[U], shift[U];
    V own_P[U], own_Q[U];
    z.template take<U>(n * set.C + c, c, za, zb, shift);
    unroll<U>([&](auto u) FLAT { own_P[u] = own_Q[u] = V{}; });
    bool keeps = to.g;
    walk<A>(count, [&](int64_t i, auto part) FLAT {
      V open{}, d_open{}, best{}, sum{};
      Int<A> first{};
      if constexpr (SPATIAL) {
        open = load(to.open + map + i, part);
        best = load(to.q0 + map + i, part);
        first = load_index<A>(to.first + map + i, part);
      }
      unroll<U>([&](auto u) FLAT {
        int64_t o = base + u * set.L + i;
        V g = loaded(load(to.grad + o, part));
        if constexpr (RELU) {
          g = load(to.out + o, part) <= V{} ? V{} : g;
          if (keeps) store(to.g + o, g, part);
        }
        V d = load(x + o, part) - shift[u];
        if constexpr (SPATIAL) {
          V t = za[u] * d + zb[u];
          d_open += g * t;
          g *= open;
          Int<A> better = t > best;
          best = better ? t : best;
          first = better ? splat_index<A>(c + u) : first;
          sum += t;
        }
        own_P[u] += g;
        own_Q[u] += g * d;
      });
      if constexpr (SPATIAL) {
        store(d_opens + i, load(d_opens + i, part) + d_open, part);
        store(to.q0 + map + i, best, part);
        store(sums + i, load(sums + i, part) + sum, part);
        store_index<A>(to.first + map + i, first, part);
      }
    });
    unroll<U>([&](auto u) FLAT { P[u] = own_P[u], Q[u] = own_Q[u]; });
  }

  template <bool SPATIAL, bool BATCH>
  INLINE void send_plane(int64_t nc, const Outgoing<T>& to) const {
    int64_t c = nc % set.C, base = nc * set.L, map = nc / set.C * set.L;
    A scale = to.scale[nc], constant = to.constant[nc], slope = BATCH ? to.slope[c] : A(0), mu = z.shift[c];
    Int<A> here = splat_index<A>(c);
    auto value = [&](int64_t i, auto part) FLAT {
      V v = load(to.g + base + i, part);
      if constexpr (SPATIAL) {
        V w = load(to.d1 + map + i, part);
        w = load_index<A>(to.first + map + i, part) == here ? w + load(to.d0 + map + i, part) : w;
        v = v * load(to.open + map + i, part) + w;
      }
      v = v * scale + constant;
      if constexpr (BATCH) v += slope * (load(x + base + i, part) - mu);
      return v;
    };
    whole_vectors(to.dx + base, value);
    if (to.peak) from_float(value(to.k[nc], Part{1})[0] + to.peak[nc], to.dx + base + to.k[nc]);
  }
};

}  // namespace
