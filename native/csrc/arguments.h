// What the operators pass to the kernels: sizes, plain pointers, and torch's threads. Only ops.cpp uses torch types, so
// that the kernels compile once per instruction set without torch's headers.
//
// Shapes: N samples, C channels, H x W pixels. T is the type of the feature map; A, the type of the computation, is
// double if T is double, else float.
#pragma once

#include <cstdint>

namespace cbam {

enum class Type { f16, bf16, f32, f64 };

// A contiguous parameter of any type; data is null if it is absent.
struct Parameter {
  const void* data = nullptr;
  Type type = Type::f32;
};

using Work = void (*)(int64_t begin, int64_t end, void* context);
using Threads = void (*)(int64_t count, Work work, void* context);

struct Norm {
  Parameter gamma, beta, mean, var;  // gamma absent: no normalisation
  bool batch = false;                // statistics of the batch, not the running ones
  double eps = 0;
};

struct Channel {
  Parameter w1, b1, w2, b2;  // w1 (hidden, C) absent: no channel gate; w2 (C, hidden)
  int64_t hidden = 0;
  bool avg = false, max = false;
  double gain = 1;
};

struct Spatial {
  Parameter kernel;  // (1, 2, side, side); absent: no spatial gate
  int64_t side = 0;
  Norm norm;
  double gain = 1;
};

struct Block {
  int64_t N, C, H, W;
  bool rows;  // channels_last: the channels of a pixel are adjacent
  bool relu;
  Norm norm;
  Channel channel;
  Spatial spatial;
  Threads threads;  // calls work on disjoint ranges of [0, count)
  int64_t width;    // the number of threads; never changes a result
};

// Results that are not wanted are null. m, gate: (N, C) A; e: (N, C) T; k: (N, C); mu, v: (C) A; s: (N, H, W) A.
struct Forward : Block {
  const void *x, *shortcut;
  Norm shortcut_norm;  // never with batch statistics
  void *out, *m, *e;
  int32_t* k;
  void *mu, *v, *gate, *s;
  double *s_mu, *s_v;
};

// mu, v, s_mu, s_v are those that the forward used. Gradients of parameters are A.
struct Backward : Block {
  const void *grad, *x, *out;
  const void *m, *e;
  const int32_t* k;
  const void *mu, *v, *gate, *s;
  const double *s_mu, *s_v;
  void *dx, *g;
  void *dgamma, *dbeta, *dw1, *db1, *dw2, *db2, *dkernel, *ds_gamma, *ds_beta;
};

// The kernels of one instruction set, indexed by Type.
struct Level {
  void (*forward[4])(const Forward&);
  void (*backward[4])(const Backward&);
};

extern const Level level_portable;
extern const Level level_avx2;
extern const Level level_avx512;

}  // namespace cbam
