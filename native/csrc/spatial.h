// The spatial gate on maps of (N, H, W): the convolution of [q0 = max_c z, q1 = mean_c z], its norm and sigmoid,
// and their gradients. A unit of work is a band of rows of one sample.
#pragma once

#include "setting.h"

namespace {

template <class T>
struct Convolution {
  using A = Acc<T>;
  using V = Vec<A>;

  const Setting<T>& set;
  int64_t side, pad, wide;  // `wide`: a row with its zero padding
  int64_t band, bands;      // rows per band, bands per sample
  Read<A> kernel;           // (2, side, side)

  explicit Convolution(const Setting<T>& s)
      : set(s),
        side(s.block.spatial.side),
        pad(side / 2),
        wide(s.W + side - 1),
        kernel(s.block.spatial.kernel, 2 * side * side) {
    band = least(s.H, up(1024, s.W));
    bands = up(s.H, band);
  }

  int64_t units() const { return set.N * bands; }
  int64_t first_row(int64_t unit) const { return unit % bands * band; }
  int64_t row_count(int64_t unit) const { return least(band, set.H - first_row(unit)); }
  int64_t offset(int64_t unit) const { return unit / bands * set.L + first_row(unit) * set.W; }
  // One padded band, and what vectors read or write beyond it.
  int64_t padded_size() const { return (band + side - 1) * wide + side + 4 * LANES<A>; }

  // Copies the unit's rows of `from`, (H, W) of its sample, and `side / 2` more on each side, with zero padding.
  void pad_band(int64_t unit, const A* from, A* to) const {
    int64_t first = first_row(unit) - pad, rows = row_count(unit) + side - 1;
    std::memset((void*)to, 0, padded_size() * sizeof(A));
    for (int64_t r = 0; r < rows; r++) {
      int64_t y = first + r;
      if (y >= 0 && y < set.H) std::memcpy(to + r * wide + pad, from + y * set.W, set.W * sizeof(A));
    }
  }

  // The sum over `inputs` padded maps and their taps, with the padded rows treated as one long row; `take` drops what
  // lies between two rows.
  void correlate(const A* const* in, int inputs, const A* weights, int64_t rows, A* flat) const {
    constexpr int U = 4;
    for (int64_t o = 0; o < rows * wide; o += U * LANES<A>) {
      V acc[U] = {};
      for (int c = 0; c < inputs; c++)
        for (int64_t i = 0; i < side; i++) {
          V row[U] = {};  // summed separately, to reduce rounding errors
          for (int64_t j = 0; j < side; j++) {
            A w = weights[(c * side + i) * side + j];
            const A* p = in[c] + o + i * wide + j;
            for (int u = 0; u < U; u++) row[u] += load(p + u * LANES<A>) * w;
          }
          for (int u = 0; u < U; u++) acc[u] += row[u];
        }
      for (int u = 0; u < U; u++) store(flat + o + u * LANES<A>, acc[u]);
    }
  }

  void take(const A* flat, int64_t rows, A* to) const {
    for (int64_t r = 0; r < rows; r++) std::memcpy(to + r * set.W, flat + r * wide, set.W * sizeof(A));
  }

  // s of a band, from q0 and q1 (N, H, W).
  void forward(int64_t unit, const A* q0, const A* q1, A* s) const {
    Buffer<A> work(3 * padded_size());
    A *in[2] = {work.get(), work + padded_size()}, *flat = work + 2 * padded_size();
    int64_t n = unit / bands, rows = row_count(unit);
    pad_band(unit, q0 + n * set.L, in[0]);
    pad_band(unit, q1 + n * set.L, in[1]);
    correlate(in, 2, kernel, rows, flat);
    take(flat, rows, s + offset(unit));
  }

  // d0 and d1 of a band from ds (N, H, W); d1 is divided by C, each channel's share in the mean.
  void transpose(int64_t unit, const A* ds, A* d0, A* d1) const {
    int64_t taps = side * side, n = unit / bands, rows = row_count(unit);
    Buffer<A> work(2 * padded_size()), flipped(2 * taps);
    for (int64_t i = 0; i < taps; i++) {
      flipped[i] = kernel[taps - 1 - i];
      flipped[taps + i] = kernel[2 * taps - 1 - i] / A(set.C);
    }
    A *in = work, *flat = work + padded_size(), *to[2] = {d0, d1};
    pad_band(unit, ds + n * set.L, in);
    for (int c = 0; c < 2; c++) {
      correlate(&in, 1, flipped + c * taps, rows, flat);
      take(flat, rows, to[c] + offset(unit));
    }
  }

  // The gradient of the kernel from one band, (2, side, side).
  void kernel_gradient(int64_t unit, const A* ds, const A* q0, const A* q1, A* gradient) const {
    Buffer<A> padded(padded_size());
    const A* q[2] = {q0, q1};
    for (int c = 0; c < 2; c++) {
      pad_band(unit, q[c] + unit / bands * set.L, padded);
      for (int64_t i = 0; i < side; i++)
        for (int64_t j = 0; j < side; j += 8)
          taps(ds + offset(unit), row_count(unit), padded + i * wide + j, least(8, side - j),
               gradient + (c * side + i) * side + j);
    }
  }

 private:
  void taps(const A* ds, int64_t rows, const A* q, int64_t count, A* gradient) const {
    V acc[8] = {};
    for (int64_t r = 0; r < rows; r++)
      walk<A>(set.W, [&](int64_t i, auto lanes) {
        V d = load(ds + r * set.W + i, lanes);
        for (int64_t j = 0; j < count; j++) acc[j] += d * load(q + r * wide + i + j, lanes);
      });
    for (int64_t j = 0; j < count; j++) gradient[j] = total<A>(acc[j]);
  }
};

// The norm of the spatial gate: shat = (s - mu) r, Ms = gain sigmoid(gamma shat + beta).
template <class A>
struct SpatialNorm {
  A gamma, beta, gain;
  double exact_mu, exact_r;
  A mu, r;

  SpatialNorm(const Spatial& part, double mean, double var)
      : gamma(*Read<A>(part.norm.gamma, 1, 1)),
        beta(*Read<A>(part.norm.beta, 1, 0)),
        gain(A(part.gain)),
        exact_mu(part.norm.gamma.data ? mean : 0),
        exact_r(part.norm.gamma.data ? 1 / std::sqrt(var + part.norm.eps) : 1),
        mu(A(exact_mu)),
        r(A(exact_r)) {}

  INLINE Vec<A> shat(Vec<A> s) const { return (s - mu) * r; }
  INLINE double exact_shat(A s) const { return (s - exact_mu) * exact_r; }
  INLINE Vec<A> logit(Vec<A> s) const { return gamma * shat(s) + beta; }
  INLINE Vec<A> open(Vec<A> s) const { return gate_of<A>(logit(s), gain); }
  // The derivative of `open` by its logit, accurate even if the gate saturates: gain e / (1 + e)^2, e = exp(-|l|).
  INLINE Vec<A> slope(Vec<A> s) const {
    Vec<A> l = logit(s), e = exponential(l > Vec<A>{} ? -l : l), one = splat(A(1));
    return gain * e / ((one + e) * (one + e));
  }
};

}  // namespace
