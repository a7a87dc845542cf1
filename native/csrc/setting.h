// What the passes of a call share: sizes and chunks, scratch memory, threads, and the affine form of a norm.
#pragma once

#include <cstdlib>
#include <new>

#include "arguments.h"
#include "vector.h"

namespace {

using namespace cbam;

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Uninitialised memory, freed with the object.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) { resize(count); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void resize(int64_t count) {
    std::free(data_);
    data_ = nullptr;
    if (count > 0 && posix_memalign((void**)&data_, 64, up(count * sizeof(A), 64) * 64)) throw std::bad_alloc();
  }
  A* get() const { return data_; }
  operator A*() const { return data_; }

 private:
  A* data_ = nullptr;
};

// The memory of a result that is returned, else scratch memory.
template <class A>
A* or_scratch(void* kept, Buffer<A>& scratch, int64_t count) {
  if (kept) return (A*)kept;
  scratch.resize(count);
  return scratch;
}

// A parameter of any type, read as A; converted only if its type differs.
template <class A>
class Read {
 public:
  Read(Parameter p, int64_t count, double absent = 0) {
    if (p.data && p.type == (sizeof(A) == 8 ? Type::f64 : Type::f32)) {
      data_ = (const A*)p.data;
      return;
    }
    own_.resize(count);
    data_ = own_;
    switch (p.data ? int(p.type) : -1) {
      case int(Type::f16): convert((const half*)p.data, count); break;
      case int(Type::bf16): convert((const bfloat*)p.data, count); break;
      case int(Type::f32): convert((const float*)p.data, count); break;
      case int(Type::f64): convert((const double*)p.data, count); break;
      default: for (int64_t i = 0; i < count; i++) own_[i] = A(absent);
    }
  }
  operator const A*() const { return data_; }

 private:
  template <class P>
  void convert(const P* p, int64_t count) {
    for (int64_t i = 0; i < count; i++) own_[i] = A(to_float(p[i]));
  }
  const A* data_;
  Buffer<A> own_;
};

// Sizes, and the split of the pixels into chunks. Nothing here depends on the number of threads, so sums have the
// same order for any number.
template <class T>
struct Setting {
  using A = Acc<T>;
  // The largest chunk if planes are contiguous: 64 values per partial sum.
  static constexpr int64_t PLANE_CHUNK = 64 * LANES<A>;

  const Block& block;
  int64_t N, C, H, W, L;
  int64_t chunk, chunks;  // pixels per chunk, chunks per sample

  explicit Setting(const Block& b) : block(b), N(b.N), C(b.C), H(b.H), W(b.W), L(b.H * b.W) {
    int64_t limit = b.rows ? most(64, least(128, 65536 / C)) : PLANE_CHUNK;
    chunk = up(up(L, up(L, limit)), 16) * 16;
    chunks = up(L, chunk);
  }

  int64_t pixels(int64_t i) const { return least(chunk, L - i * chunk); }

  // Calls f(begin, end) on disjoint ranges of [0, count), in torch's threads.
  template <class F>
  void parallel(int64_t count, const F& f) const {
    block.threads(count, [](int64_t begin, int64_t end, void* context) { (*(const F*)context)(begin, end); },
                  (void*)&f);
  }
};

// Count, mean and second moment about the mean; parts are merged in order (Chan).
struct Moments {
  double count = 0, mean = 0, square = 0;

  void merge(const Moments& part) {
    double delta = part.mean - mean, all = count + part.count;
    square += part.square + delta * delta * count * part.count / all;
    mean += delta * part.count / all;
    count = all;
  }
};

// The affine form of a norm per channel, y = a (x - shift) + b, with r = 1 / sqrt(var + eps).
template <class A>
struct Affine {
  Buffer<A> a, shift, b, r;

  // With batch statistics y = gamma r (x - mu) + beta. With running statistics y = (gamma r) x + (beta - mu gamma r),
  // in the order of torch's own BatchNorm on the CPU, so that a gate of 1 gives a bit-identical result.
  Affine(const Norm& norm, int64_t C, const A* mu, const A* var, bool centred) : a(C), shift(C), b(C), r(C) {
    Read<A> gamma(norm.gamma, C, 1), beta(norm.beta, C, 0);
    bool given = norm.gamma.data;
    for (int64_t c = 0; c < C; c++) {
      r[c] = given ? A(1) / std::sqrt(var[c] + A(norm.eps)) : A(1);
      a[c] = r[c] * gamma[c];
      shift[c] = given && centred ? mu[c] : A(0);
      b[c] = given && !centred ? beta[c] - mu[c] * a[c] : beta[c];
    }
  }

  // za and zb of a sample; `open` is its channel gate, null if there is none.
  void scale(const A* open, int64_t C, A* za, A* zb) const {
    walk<A>(C, [&](int64_t c, auto part) {
      Vec<A> gate = open ? load(open + c, part) : splat(A(1));
      store(za + c, gate * load(a.get() + c, part), part);
      store(zb + c, gate * load(b.get() + c, part), part);
    });
  }
};

}  // namespace
