// The backward: 1 | spatial gate | 2 | channel gate and norm | 3, in the notation of the forward:
//   dz = g Ms + weight,  R0 = sum_p dz = P + G,  R1 = sum_p dz (x - mu) = Q + H,
// with g the gradient masked by the ReLU, weight = d1 + [c attains the maximum] d0 from the spatial gate,
// P, Q the sums of g Ms, and G, H those of weight.
#pragma once

#include "forward.h"

namespace {

template <class T>
struct BackwardPass {
  using A = Acc<T>;
  using V = Vec<A>;

  const Backward& call;
  Setting<T> set;
  bool normed, channel, spatial, batch;
  const T* x;
  const A *m, *gate, *s, *mu;
  const T *e, *g;
  Affine<A> norm;  // centred: y = a (x - mu) + b
  Buffer<A> za, zb, open, d_open, q0, q1, d0, d1;
  Buffer<Index<A>> first;
  Buffer<A> P, Q, H;         // (N, chunks, C); H (N, C) if planes are contiguous
  Buffer<double> r0, r1;     // (N, C)
  Buffer<A> d_descriptor;    // (N, pools, C)
  Buffer<A> own_dbeta;
  A* dbeta;

  explicit BackwardPass(const Backward& b)
      : call(b),
        set(b),
        normed(b.norm.gamma.data),
        channel(b.channel.w1.data),
        spatial(b.spatial.kernel.data),
        batch(normed && b.norm.batch),
        x((const T*)b.x),
        m((const A*)b.m),
        gate((const A*)b.gate),
        s((const A*)b.s),
        mu((const A*)b.mu),
        e((const T*)b.e),
        g((const T*)(b.relu ? b.g : b.grad)),
        norm(b.norm, b.C, (const A*)b.mu, (const A*)b.v, true),
        za(b.N * b.C),
        zb(b.N * b.C),
        P(b.N * set.chunks * b.C),
        Q(b.N * set.chunks * b.C),
        r0(b.N * b.C),
        r1(b.N * b.C),
        dbeta(or_scratch(b.dbeta, own_dbeta, normed ? b.C : 0)) {
    if (!spatial) return;
    int64_t maps = set.N * set.L;
    for (Buffer<A>* map : {&open, &d_open, &q0, &q1, &d0, &d1}) map->resize(maps);
    first.resize(maps);
    H.resize(set.N * set.C * (b.rows ? set.chunks : 1));
  }

  void run() {
    set.parallel(set.N, [&](int64_t n, int64_t end) { for (; n < end; n++) prepare(n); });
    Incoming<T> in{(const T*)call.grad, (const T*)call.out, (T*)call.g, spatial ? open.get() : nullptr,
                   d_open, q0, q1, first, P, Q, call.relu};
    set.parallel(set.N * set.chunks, [&](int64_t u, int64_t end) {
      for (; u < end; u++) call.rows ? rows().receive(u, in) : planes().receive(u, in);
    });
    if (spatial) {
      through_convolution(through_sigmoid());
      weigh();
    }
    set.parallel(set.N, [&](int64_t n, int64_t end) { for (; n < end; n++) gather(n); });
    if (channel) through_gate();
    if (normed) norm_gradients();
    if (call.dx) send();
  }

 private:
  Scale<A> scaled() const { return {za.get(), zb.get(), norm.shift.get()}; }
  Planes<T> planes() const { return {set, x, scaled()}; }
  Rows<T> rows() const { return {set, x, scaled()}; }
  A opened(int64_t nc) const { return channel ? gate[nc] : A(1); }
  SpatialNorm<A> spatial_norm() const {
    bool given = call.spatial.norm.gamma.data;
    return {call.spatial, given ? *call.s_mu : 0, given ? *call.s_v : 0};
  }

  // Ms, za and zb of a sample.
  void prepare(int64_t n) {
    int64_t at = n * set.C;
    norm.scale(channel ? gate + at : nullptr, set.C, za + at, zb + at);
    if (!spatial) return;
    SpatialNorm<A> s_norm = spatial_norm();
    walk<A>(set.L, [&](int64_t p, auto part) {
      store(open + n * set.L + p, s_norm.open(load(s + n * set.L + p, part)), part);
    });
  }

  struct Cancelling {
    double du = 0, du_shat = 0;
  };

  // Turns d_open into du, the gradient of the logits. Its sums cancel strongly, so they are computed in double.
  Cancelling through_sigmoid() {
    SpatialNorm<A> s_norm = spatial_norm();
    Buffer<Cancelling> parts(set.N);
    set.parallel(set.N, [&](int64_t n, int64_t end) {
      for (; n < end; n++) {
        Cancelling sum;
        A* du = d_open + n * set.L;
        const A* from = s + n * set.L;
        walk<A>(set.L, [&](int64_t p, auto part) {
          store(du + p, load(du + p, part) * s_norm.slope(load(from + p, part)), part);
        });
        for (int64_t p = 0; p < set.L; p++) {
          sum.du += du[p];
          sum.du_shat += du[p] * s_norm.exact_shat(from[p]);
        }
        parts[n] = sum;
      }
    });
    Cancelling sum;
    for (int64_t n = 0; n < set.N; n++) sum.du += parts[n].du, sum.du_shat += parts[n].du_shat;
    if (call.ds_gamma) *(A*)call.ds_gamma = A(sum.du_shat);
    if (call.ds_beta) *(A*)call.ds_beta = A(sum.du);
    return sum;
  }

  // Turns d_open into ds, and computes d0, d1 and the kernel's gradient from it. A mean rounded to float would be off
  // by the same amount at every pixel, which adds up over the kernel's taps.
  void through_convolution(Cancelling sum) {
    SpatialNorm<A> s_norm = spatial_norm();
    double scale = s_norm.gamma * s_norm.exact_r, count = double(set.N * set.L);
    bool centred = call.spatial.norm.batch;
    double mean = sum.du / count, slope = sum.du_shat / count;
    set.parallel(set.N, [&](int64_t n, int64_t end) {
      for (int64_t p = n * set.L; p < end * set.L; p++) {
        double du = d_open[p];
        if (centred) du = du - mean - s_norm.exact_shat(s[p]) * slope;
        d_open[p] = A(scale * du);
      }
    });
    Convolution<T> convolution(set);
    int64_t taps = 2 * convolution.side * convolution.side;
    Buffer<A> parts(convolution.units() * taps);
    set.parallel(convolution.units(), [&](int64_t u, int64_t end) {
      for (; u < end; u++) {
        convolution.transpose(u, d_open, d0, d1);
        convolution.kernel_gradient(u, d_open, q0, q1, parts + u * taps);
      }
    });
    for (int64_t i = 0; i < taps; i++) {
      double total = 0;
      for (int64_t u = 0; u < convolution.units(); u++) total += parts[u * taps + i];
      ((A*)call.dkernel)[i] = A(total);
    }
  }

  // Pass 2: the sums of d1 (x - mu). `gather` adds those of d0, which affects only one channel of each pixel.
  void weigh() {
    if (call.rows)
      set.parallel(set.N * set.chunks, [&](int64_t u, int64_t end) {
        for (; u < end; u++) rows().weigh(u, d1, H + u * set.C);
      });
    else
      set.parallel(set.N * set.C, [&](int64_t i, int64_t end) { for (; i < end; i++) H[i] = planes().weigh(i, d1); });
  }

  // R0 and R1 of a sample.
  void gather(int64_t n) {
    double *zeroth = r0 + n * set.C, *one = r1 + n * set.C;
    for (int64_t c = 0; c < set.C; c++) zeroth[c] = one[c] = 0;
    for (int64_t u = n * set.chunks; u < (n + 1) * set.chunks; u++)
      for (int64_t c = 0; c < set.C; c++) zeroth[c] += P[u * set.C + c], one[c] += Q[u * set.C + c];
    if (!spatial) return;
    int64_t parts = call.rows ? set.chunks : 1;
    for (int64_t u = n * parts; u < (n + 1) * parts; u++)
      for (int64_t c = 0; c < set.C; c++) one[c] += H[u * set.C + c];
    double dense = 0;
    const Index<A>* c = first + n * set.L;
    for (int64_t p = 0; p < set.L; p++) {
      A d = d0[n * set.L + p], value = call.rows ? rows().pixel(n, c[p], p) : planes().pixel(n, c[p], p);
      dense += d1[n * set.L + p];
      zeroth[c[p]] += d;
      one[c[p]] += double(d) * (value - norm.shift[c[p]]);
    }
    for (int64_t i = 0; i < set.C; i++) zeroth[i] += dense;
  }

  void through_gate() {
    Gate<T> gates(set);
    Affine<A> forward_norm(call.norm, set.C, mu, (const A*)call.v, batch);  // as in the forward
    Buffer<A> dl(set.N * set.C);
    A gain = A(call.channel.gain);
    set.parallel(set.N, [&](int64_t n, int64_t end) {
      for (; n < end; n++) {
        gates.describe(n, forward_norm, m, e);
        for (int64_t c = 0, i = n * set.C; c < set.C; c++, i++) {
          double d = norm.a[c] * r1[i] + norm.b[c] * r0[i];
          dl[i] = A(d * gate[i] * (gain - gate[i]) / gain);
        }
      }
    });
    set.parallel(gates.hidden_units(), [&](int64_t u, int64_t end) { for (; u < end; u++) gates.hide(u, 0, set.N); });
    d_descriptor.resize(set.N * gates.pools * set.C);
    gates.backward(dl, d_descriptor, (A*)call.dw1, (A*)call.db1, (A*)call.dw2, (A*)call.db2);
  }

  // The gradients of the descriptors of sample n; null if the pool is not used.
  const A* d_avg(int64_t n) const { return channel && call.channel.avg ? descriptor(n, 0) : nullptr; }
  const A* d_max(int64_t n) const { return channel && call.channel.max ? descriptor(n, call.channel.avg) : nullptr; }
  const A* descriptor(int64_t n, int64_t pool) const {
    return d_descriptor.get() + (n * (call.channel.avg + call.channel.max) + pool) * set.C;
  }

  // dbeta = sum_n [Mc R0 + davg + dmax], dgamma = r sum_n [Mc R1 + davg (m - mu) + dmax (e - mu)].
  void norm_gradients() {
    Buffer<double> beta(set.C), gamma(set.C);
    for (int64_t c = 0; c < set.C; c++) beta[c] = gamma[c] = 0;
    for (int64_t n = 0; n < set.N; n++) {
      const A *avg = d_avg(n), *top = d_max(n);
      for (int64_t c = 0, i = n * set.C; c < set.C; c++, i++) {
        beta[c] += opened(i) * r0[i];
        gamma[c] += opened(i) * r1[i];
        if (avg) beta[c] += avg[c], gamma[c] += double(avg[c]) * (m[i] - mu[c]);
        if (top) beta[c] += top[c], gamma[c] += double(top[c]) * (A(to_float(e[i])) - mu[c]);
      }
    }
    for (int64_t c = 0; c < set.C; c++) {
      dbeta[c] = A(beta[c]);
      ((A*)call.dgamma)[c] = A(norm.r[c] * gamma[c]);
    }
  }

  // Pass 3.
  void send() {
    int64_t N = set.N, C = set.C;
    Buffer<A> constant(N * C), peak(channel && call.channel.max ? N * C : 0), slope(batch ? C : 0);
    A L = A(set.L), M = A(N * set.L);
    const A* dgamma = (const A*)call.dgamma;
    for (int64_t c = 0; c < C && batch; c++) slope[c] = -norm.a[c] * norm.r[c] * (dgamma[c] / M);
    set.parallel(N, [&](int64_t n, int64_t end) {
      for (; n < end; n++) {
        const A *avg = d_avg(n), *top = d_max(n);
        for (int64_t c = 0, i = n * C; c < C; c++, i++) {
          constant[i] = norm.a[c] * ((avg ? avg[c] / L : A(0)) - (batch ? dbeta[c] / M : A(0)));
          if (top) peak[i] = norm.a[c] * top[c];
        }
      }
    });
    Outgoing<T> to{g,  (T*)call.dx, spatial ? open.get() : nullptr, d0, d1, first, za, constant, peak.get(),
                   call.k, slope.get()};
    set.parallel(N * (call.rows ? set.chunks : C), [&](int64_t u, int64_t end) {
      for (; u < end; u++) call.rows ? rows().send(u, to) : planes().send(u, to);
    });
  }
};

template <class T>
void backward(const Backward& call) {
  BackwardPass<T>(call).run();
}

}  // namespace
