// The end of a decode linear: the sums of a row block's product are gathered and become y.
#pragma once

#include "packed.cuh"

enum Epilogue { STORE = 0, RESIDUAL = 1, SWIGLU = 2, LOGITS = 3 };

// Where sums are found.

template <int ROWS, int WARPS_K, int ABREAST, int LINE> struct Reduced {  // of the warps of this block, in this round
  const float* buffer;
  DEVICE float operator()(int sub, int n, int line) const {
    const float* const from = buffer + ((sub / ABREAST * WARPS_K * ABREAST + sub % ABREAST) * ROWS + n) * LINE + line;
    float v[4] = {};  // no long chain of sums
#pragma unroll
    for (int i = 0; i < WARPS_K; i++) v[i % 4] += from[i * ABREAST * ROWS * LINE];
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
};

// In a cluster the elements of all rounds go round, 32 at a time, and each block writes what it found of an element into
// the shared memory of the one whose it is. With SWIGLU an element has two sums.
template <int SLABS, int LINES> struct InCluster {
  static constexpr int SUMS = ROW_BLOCK / LINES;
  float* parts;
  int owned;  // elements of a block, at most

  DEVICE InCluster(float* parts, int elements) : parts(parts), owned((elements + 32 * SLABS - 1) / (32 * SLABS) * 32) {}
  DEVICE static int mine(int slab, int thread) { return (thread / 32 * SLABS + slab) * 32 + thread % 32; }
  DEVICE static int place(int e) { return e / (32 * SLABS) * 32 + e % 32; }

  DEVICE void put(int slab, int e, int which, float v) const {
    store_cluster(cluster_address(shared_address(parts + (slab * SUMS + which) * owned + place(e)), e / 32 % SLABS), v);
  }
  template <class At> DEVICE float operator()(int e, const At&, int which) const {
    float v = 0.f;
#pragma unroll
    for (int i = 0; i < SLABS; i++) v += parts[(i * SUMS + which) * owned + place(e)];
    return v;
  }
};

template <int ROWS, int SLABS> struct InWorkspace {  // of all slabs; `partials` at the first round's row block
  const float* partials;
  int step;
  u64 slab_stride;
  template <class At> DEVICE float operator()(int, const At& at, int which) const {
    const u64 row_block = at.round * step + at.sub;
    const float* const from = partials + (row_block * ROWS + at.n) * ROW_BLOCK + at.line + which * 8;
    float v = 0.f;
#pragma unroll
    for (int i = 0; i < SLABS; i++) v += load_l2(from + i * slab_stride);
    return v;
  }
};

// Element e of some rounds of row blocks, SIDE_BY_SIDE · ROWS · LINES each: whose it is.
template <int ROWS, int SIDE_BY_SIDE, int LINES> struct Element {
  int round, sub, n, line;
  DEVICE explicit Element(int e)
      : round(e / (SIDE_BY_SIDE * ROWS * LINES)), sub(e / (ROWS * LINES) % SIDE_BY_SIDE), n(e / LINES % ROWS),
        line(e % LINES) {}
};

// What becomes of y.
template <int EPILOGUE, bool NORM> struct Writer {
  const float* factors;
  const float* bias;
  void* out;
  const float* gain;
  const float* scales;
  u16* scaled;
  float* squares_out;
  int row_blocks, outputs;
  // Lines of a row block that have a result: with SWIGLU a pair of rows, `line` and `line + 8`, becomes one.
  static constexpr int LINES = EPILOGUE == SWIGLU ? 8 : 16;

  // What an element needs from memory; loaded early, it costs no time at the end.
  struct Before {
    float residual, gain;
  };

  DEVICE bool has(int row_block, int line) const {
    return row_block < row_blocks && row_block * LINES + line < outputs;
  }

  DEVICE Before before(int row_block, int n, int line) const {
    if (EPILOGUE != RESIDUAL || !has(row_block, line)) return {0.f, 0.f};
    const int column = row_block * LINES + line;
    return {load_l2((const float*)out + (u64)n * outputs + column), gain ? __ldg(gain + column) * load_l2(scales + n) : 0.f};
  }

  // One line; whole warps call it, with sixteen lanes for the lines of a row, and `there` says who has one.
  DEVICE void put(int row_block, int n, int line, bool there, float v, float up, const Before& before) const {
    if constexpr (NORM) v *= factors[n], up *= factors[n];
    if (bias && there) v += bias[row_block * ROW_BLOCK + line];
    const u64 at = (u64)n * outputs + row_block * LINES + line;
    const bool stored = there && has(row_block, line);
    if constexpr (EPILOGUE == SWIGLU) {
      if (bias && there) up += bias[row_block * ROW_BLOCK + line + 8];
      if (stored) ((u16*)out)[at] = float_to_half(v / (1.f + __expf(-v)) * up);
    } else if constexpr (EPILOGUE == RESIDUAL) {
      v += before.residual;
      if (stored) ((float*)out)[at] = v;
      if (gain) {
        if (stored) scaled[at] = float_to_half(v * before.gain);
        float square = stored ? v * v : 0.f;
#pragma unroll
        for (int o = 8; o; o >>= 1) square += __shfl_xor_sync(FULL_WARP, square, o);
        if (stored && line == 0) squares_out[(u64)n * row_blocks + row_block] = square;
      }
    } else if constexpr (EPILOGUE == LOGITS) {
      if (stored) ((float*)out)[at] = v;
    } else {
      if (stored) ((u16*)out)[at] = float_to_half(v);
    }
  }

  // Elements `begin`, `begin + by`, … of all rounds of a block whose first row block is `row_block0`, some at a time so
  // that their loads are in flight together. `ready` is called once, when sums are wanted.
  template <int ROWS, int SIDE_BY_SIDE, class Source, class Ready>
  DEVICE void put_all(const Source& source, int row_block0, int step, int rounds, int begin, int by, Ready ready) const {
    constexpr int AT_ONCE = 4;
    const int elements = rounds * SIDE_BY_SIDE * ROWS * LINES;
    bool waited = false;
#pragma unroll 1
    for (int e0 = begin; (e0 & ~31) < elements; e0 += AT_ONCE * by) {
      float v[AT_ONCE], up[AT_ONCE];
      Before old[AT_ONCE];
      bool there[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const Element<ROWS, SIDE_BY_SIDE, LINES> at(e0 + i * by);
        const int row_block = row_block0 + at.round * step + at.sub;
        there[i] = e0 + i * by < elements && row_block < row_blocks;
        old[i] = {0.f, 0.f}, v[i] = up[i] = 0.f;
        if (there[i]) old[i] = before(row_block, at.n, at.line);
      }
      if (!waited) ready();
      waited = true;
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const Element<ROWS, SIDE_BY_SIDE, LINES> at(e0 + i * by);
        if (there[i]) v[i] = source(e0 + i * by, at, 0);
        if (EPILOGUE == SWIGLU && there[i]) up[i] = source(e0 + i * by, at, 1);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const Element<ROWS, SIDE_BY_SIDE, LINES> at(e0 + i * by);
        put(row_block0 + at.round * step + at.sub, at.n, at.line, there[i], v[i], up[i], old[i]);
      }
    }
    if (!waited) ready();
  }
};
