// The forward: A | statistics | gate | B | convolution | C. If no statistics span the batch and there are enough
// samples for the threads, it runs sample by sample, from cache; only a gate of many weights, and A before it, run
// for the batch at once.
#pragma once

#include <optional>

#include "gate.h"
#include "planes.h"
#include "pool.h"
#include "rows.h"
#include "spatial.h"

namespace {

// +1, -1 or 0 per channel: the sign of gamma, with which the largest sign x is the extremum of pass A.
template <class A>
void signs(const Norm& norm, int64_t C, A* sign) {
  Read<A> gamma(norm.gamma, C, 1);
  for (int64_t c = 0; c < C; c++) sign[c] = gamma[c] > 0 ? A(1) : gamma[c] < 0 ? A(-1) : A(0);
}

template <class T>
struct ForwardPass {
  using A = Acc<T>;
  using V = Vec<A>;

  const Forward& call;
  Setting<T> set;
  bool normed, channel, spatial;
  Buffer<A> own_m, own_gate, own_mu, own_v, own_s, m2, za, zb, q0, q1, open;
  Buffer<T> own_e;
  std::optional<Affine<A>> of_shortcut;
  A *m = nullptr, *mu = nullptr, *v = nullptr, *gate = nullptr, *s = nullptr;
  T* e = nullptr;

  explicit ForwardPass(const Forward& f)
      : call(f),
        set(f),
        normed(f.norm.gamma.data),
        channel(f.channel.w1.data),
        spatial(f.spatial.kernel.data),
        za(f.N * f.C),
        zb(f.N * f.C) {
    int64_t vectors = set.N * set.C, maps = set.N * set.L;
    if (channel || (normed && f.norm.batch) || f.m) {
      m = or_scratch(f.m, own_m, vectors);
      e = or_scratch(f.e, own_e, vectors);
    }
    if (normed && f.norm.batch) m2.resize(vectors);
    if (normed) {
      mu = or_scratch(f.mu, own_mu, set.C);
      v = or_scratch(f.v, own_v, set.C);
    }
    if (channel) gate = or_scratch(f.gate, own_gate, vectors);
    if (spatial) {
      s = or_scratch(f.s, own_s, maps);
      q0.resize(maps);
      q1.resize(maps);
      open.resize(maps);
    }
    if (f.shortcut_norm.gamma.data) {
      Read<A> mean(f.shortcut_norm.mean, set.C), var(f.shortcut_norm.var, set.C);
      of_shortcut.emplace(f.shortcut_norm, set.C, mean, var, false);
    }
  }

  void run() {
    Buffer<A> sign(set.C);
    signs(call.norm, set.C, sign.get());
    Pool<T> pool(set, (const T*)call.x, sign, m, m2, e, channel && call.channel.max ? call.k : nullptr);
    bool across = (normed && call.norm.batch) || (spatial && call.spatial.norm.batch);
    if (!across && normed) running_statistics();
    if (!across && samples_for_all()) {
      Affine<A> norm(call.norm, set.C, mu, v, false);
      each_sample(pool, norm);
    } else {
      each_pass(pool);
    }
  }

 private:
  // Whether the threads get about equal numbers of samples.
  bool samples_for_all() const {
    return set.N >= call.width && (set.N % call.width == 0 || set.N >= 4 * call.width);
  }

  void each_sample(Pool<T>& pool, const Affine<A>& norm) {
    Gate<T> gates(set);
    Convolution<T> convolution(set);
    Read<A> s_mean(call.spatial.norm.mean, 1), s_var(call.spatial.norm.var, 1);
    SpatialNorm<A> s_norm(call.spatial, *s_mean, *s_var);
    if (spatial) keep_spatial(*s_mean, *s_var);
    // Sample by sample, the gate reads its weights once per sample: only if they are few compared to the map.
    bool at_once = channel && 2 * call.channel.hidden * 2 >= set.L;
    if (at_once) {
      set.parallel(set.N, [&](int64_t n, int64_t end) {
        for (; n < end; n++) {
          pool.sample(n);
          gates.describe(n, norm, m, e);
        }
      });
      gates.described(gate);
    }
    set.parallel(set.N, [&](int64_t n, int64_t end) {
      for (; n < end; n++) {
        if (m && !at_once) pool.sample(n);
        if (channel && !at_once) gates.sample(n, norm, m, e, gate);
        scale(n, norm);
        if (spatial) {
          for (int64_t i = 0; i < set.chunks; i++) describe(n * set.chunks + i, norm);
          for (int64_t i = 0; i < convolution.bands; i++) convolution.forward(n * convolution.bands + i, q0, q1, s);
          open_map(n, s_norm);
        }
        int64_t units = set.block.rows ? set.chunks : set.C;
        write(n * units, (n + 1) * units, norm);
      }
    });
  }

  void each_pass(Pool<T>& pool) {
    if (m) pool.all();
    if (normed && call.norm.batch) batch_statistics();
    else if (normed) running_statistics();
    Affine<A> norm(call.norm, set.C, mu, v, call.norm.batch);
    if (channel) Gate<T>(set).all(norm, m, e, gate);
    set.parallel(set.N, [&](int64_t n, int64_t end) { for (; n < end; n++) scale(n, norm); });
    if (spatial) {
      set.parallel(set.N * set.chunks, [&](int64_t u, int64_t end) { for (; u < end; u++) describe(u, norm); });
      SpatialNorm<A> s_norm = convolve();
      set.parallel(set.N, [&](int64_t n, int64_t end) { for (; n < end; n++) open_map(n, s_norm); });
    }
    set.parallel(set.N * (set.block.rows ? set.chunks : set.C),
                 [&](int64_t from, int64_t end) { write(from, end, norm); });
  }

  // mu and biased var of each channel, merged over the samples in order.
  void batch_statistics() {
    constexpr int64_t CUT = 64;
    int64_t C = set.C, cuts = up(C, CUT);
    set.parallel(cuts, [&](int64_t i, int64_t end) {
      for (; i < end; i++) {
        Moments sums[CUT];
        int64_t from = i * CUT, count = least(CUT, C - from);
        for (int64_t n = 0; n < set.N; n++)
          for (int64_t c = 0; c < count; c++)
            sums[c].merge({double(set.L), m[n * C + from + c], m2[n * C + from + c]});
        for (int64_t c = 0; c < count; c++) {
          mu[from + c] = A(sums[c].mean);
          v[from + c] = A(sums[c].square / sums[c].count);
        }
      }
    });
  }

  void running_statistics() {
    Read<A> mean(call.norm.mean, set.C), var(call.norm.var, set.C);
    std::memcpy((void*)mu, mean, set.C * sizeof(A));
    std::memcpy((void*)v, var, set.C * sizeof(A));
  }

  void scale(int64_t n, const Affine<A>& norm) {
    int64_t at = n * set.C;
    norm.scale(channel ? gate + at : nullptr, set.C, za + at, zb + at);
  }

  Scale<A> scaled(const Affine<A>& norm) const { return {za.get(), zb.get(), norm.shift.get()}; }

  void describe(int64_t unit, const Affine<A>& norm) {
    const T* x = (const T*)call.x;
    if (set.block.rows) Rows<T>{set, x, scaled(norm)}.describe(unit, q0, q1);
    else Planes<T>{set, x, scaled(norm)}.describe(unit, q0, q1);
  }

  SpatialNorm<A> convolve() {
    Convolution<T> convolution(set);
    Buffer<Moments> parts(convolution.units());
    set.parallel(convolution.units(), [&](int64_t u, int64_t end) {
      for (; u < end; u++) {
        convolution.forward(u, q0, q1, s);
        parts[u] = moments(s + convolution.offset(u), convolution.row_count(u) * set.W);
      }
    });
    if (!call.spatial.norm.batch) {
      Read<double> mean(call.spatial.norm.mean, 1), var(call.spatial.norm.var, 1);
      keep_spatial(*mean, *var);
      return {call.spatial, *mean, *var};
    }
    Moments sum;
    for (int64_t u = 0; u < convolution.units(); u++) sum.merge(parts[u]);
    keep_spatial(sum.mean, sum.square / sum.count);
    return {call.spatial, sum.mean, sum.square / sum.count};
  }

  static Moments moments(const A* p, int64_t count) {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < count; i++) sum += p[i];
    double mean = sum / double(count);
    for (int64_t i = 0; i < count; i++) square += (p[i] - mean) * (p[i] - mean);
    return {double(count), mean, square};
  }

  void keep_spatial(double mean, double var) {
    bool given = call.spatial.norm.gamma.data;
    if (call.s_mu) *call.s_mu = given ? mean : 0;
    if (call.s_v) *call.s_v = given ? var : 1;
  }

  void open_map(int64_t n, const SpatialNorm<A>& norm) {
    const A* from = s + n * set.L;
    A* to = open + n * set.L;
    walk<A>(set.L, [&](int64_t p, auto part) { store(to + p, norm.open(load(from + p, part)), part); });
  }

  void write(int64_t from, int64_t end, const Affine<A>& norm) {
    const T* x = (const T*)call.x;
    const A *sa = of_shortcut ? of_shortcut->a.get() : nullptr, *sb = of_shortcut ? of_shortcut->b.get() : nullptr;
    Output<T> to{(const T*)call.shortcut, sa, sb, (T*)call.out, spatial ? open.get() : nullptr, call.relu};
    if (set.block.rows) Rows<T>{set, x, scaled(norm)}.write(from, end, to);
    else Planes<T>{set, x, scaled(norm)}.write(from, end, to);
  }
};

template <class T>
void forward(const Forward& call) {
  ForwardPass<T>(call).run();
}

}  // namespace
