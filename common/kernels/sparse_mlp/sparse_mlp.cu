// Axial mixing of sMLPNet and its gradient, channels last, 16-bit. README.md of this folder: formula, plans, bytes.
//
// z (B, H, W, C), u and its gradient g (B, H, W, 3C) with the parts [z; row; col] along the channels. An image of u has
// fewer than 2^31 elements.
//
//   axial_mix       u = [z; A along W; D along H]
//   axial_backward  dz = g0 + A' g1 along W + D' g2 along H, and in the same pass over g
//                   dA[j, k] = sum g1[.., j, c] z[.., k, c] over images, rows and channels; likewise dD along columns
//
// Row and column mixing are one thing, a matrix applied to every line: S pixels, their distance in memory 1 or W
// pixels. A block of eight warps takes TILE channels of 64 / S_PAD lines at a time as a tile of 64 pixels; sides are
// padded with zeros to S_PAD, a multiple of 16. Products: mma.sync m16n8k16 with float accumulators; four warps share
// the tile's pixels, twice four the columns of the product. The next two tiles are on their way from memory while one
// is worked on.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using i64 = long long;

constexpr int THREADS = 256;
constexpr int ROWS = 64;             // of a tile: pixels of its lines
constexpr int TILE = 32;             // channels of a tile
constexpr int PITCH = TILE + 8;      // 80 bytes between rows: aligned, and 8 rows meet all banks once
constexpr int VECTORS = TILE / 8;    // 16-byte vectors in a row
constexpr int OWN = ROWS * VECTORS / THREADS;  // vectors of a tile that one thread moves

using Vector = uint4;

__device__ __forceinline__ float widen(__half a) { return __half2float(a); }
__device__ __forceinline__ float widen(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ __forceinline__ void narrow(float a, __half& out) { out = __float2half_rn(a); }
__device__ __forceinline__ void narrow(float a, __nv_bfloat16& out) { out = __float2bfloat16_rn(a); }

template <typename T>
__device__ __forceinline__ unsigned pack(T low, T high) {
  union {
    T t[2];
    unsigned u;
  } both;
  both.t[0] = low;
  both.t[1] = high;
  return both.u;
}

// acc (16x8) += a (16x16) b (16x8). Lane 4 g + t holds of a: rows g, g + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9;
// of b: rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g; of acc: rows g, g + 8, columns 2t, 2t + 1.
__device__ __forceinline__ void multiply(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                         __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// b of `multiply` from a 16x8 piece of a tile with its 8 columns side by side; lane l points at row l % 16.
template <typename T>
__device__ __forceinline__ void load_b(unsigned (&b)[2], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
}

// The lines of an image: count lines of length pixels. Distances in pixels.
struct Lines {
  int count, length, line_step, pixel_step;
};

__device__ __forceinline__ Lines lines_along(bool width, int H, int W) {
  if (width) return {H, W, W, 1};
  return {W, H, 1, W};
}

// The OWN vectors of the tile beginning at line `first` that belong to this thread: use(k, row, column, pixel), where
// pixel is the pixel's number in the image, or -1 in the padding.
template <int S_PAD, typename Use>
__device__ __forceinline__ void each_vector(const Lines& lines, int first, int channels, Use use) {
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int v = k * THREADS + threadIdx.x;
    const int row = v / VECTORS, column = v % VECTORS * 8;
    const int line = first + row / S_PAD, position = row % S_PAD;
    const bool real = line < lines.count && position < lines.length && column < channels;
    use(k, row, column, real ? line * lines.line_step + position * lines.pixel_step : -1);
  }
}

// Memory -> registers. `from` is the image's first pixel at the tile's first channel, `stride` a pixel in elements.
template <int S_PAD, typename T>
__device__ __forceinline__ void fetch(Vector (&held)[OWN], const T* from, int stride, const Lines& lines, int first,
                                      int channels) {
  each_vector<S_PAD>(lines, first, channels, [&](int k, int, int column, int pixel) {
    held[k] = Vector{};
    if (pixel >= 0) held[k] = *reinterpret_cast<const Vector*>(from + pixel * stride + column);
  });
}

template <typename T>
__device__ __forceinline__ void put(T (&tile)[ROWS][PITCH], const Vector (&held)[OWN]) {
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int v = k * THREADS + threadIdx.x;
    *reinterpret_cast<Vector*>(&tile[v / VECTORS][v % VECTORS * 8]) = held[k];
  }
}

// Which 16 pixels of which of the tile's lines a warp computes, which half of the columns, and its lane's place in a
// fragment.
template <int S_PAD>
struct Place {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int warp = threadIdx.x / 32 % 4, half = threadIdx.x / 128;
  int slot = warp / (S_PAD / 16);         // line within the tile
  int top = warp % (S_PAD / 16) * 16;     // first pixel within the line
};

// Rows top .. top + 15 of an n x n matrix, or of its transpose, as left factors, zero outside.
template <int S_PAD, bool TRANSPOSED, typename T>
__device__ __forceinline__ void load_matrix(unsigned (&a)[S_PAD / 16][4], const T* matrix, int n) {
  const Place<S_PAD> at;
  const auto entry = [&](int row, int column) {
    T zero{};
    if (row >= n || column >= n) return zero;
    return matrix[TRANSPOSED ? column * n + row : row * n + column];
  };
#pragma unroll
  for (int k = 0; k < S_PAD / 16; ++k)
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = at.top + at.g + part % 2 * 8, column = k * 16 + part / 2 * 8 + 2 * at.t;
      a[k][part] = pack(entry(row, column), entry(row, column + 1));
    }
}

// result = matrix times the lines of the tile; result rows match tile rows.
template <int S_PAD, typename T>
__device__ __forceinline__ void mix_tile(float (&result)[ROWS][TILE + 4], const T (&tile)[ROWS][PITCH],
                                         const unsigned (&a)[S_PAD / 16][4]) {
  const Place<S_PAD> at;
#pragma unroll
  for (int k8 = 0; k8 < TILE / 16; ++k8) {
    const int n = at.half * (TILE / 16) + k8;
    float acc[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < S_PAD / 16; ++k) {
      unsigned b[2];
      load_b(b, &tile[at.slot * S_PAD + k * 16 + at.lane % 16][n * 8]);
      multiply(acc, a[k], b, T{});
    }
    const int row = at.slot * S_PAD + at.top + at.g, column = n * 8 + 2 * at.t;
    result[row][column] = acc[0];
    result[row][column + 1] = acc[1];
    result[row + 8][column] = acc[2];
    result[row + 8][column + 1] = acc[3];
  }
}

// acc += the lines of g times those of z, pixel by pixel, summed over the tile's channels; bias += g times ones. Each
// half of the warps has half of acc's columns, the first half has the bias.
template <int S_PAD, typename T>
__device__ __forceinline__ void gram_tile(float (&acc)[S_PAD / 16][4], float (&bias)[4], const T (&g_tile)[ROWS][PITCH],
                                          const T (&z_tile)[ROWS][PITCH], const unsigned (&column_of_ones)[2]) {
  const Place<S_PAD> at;
#pragma unroll 1  // fewer registers
  for (int k = 0; k < TILE; k += 16) {
    const auto pair = [&](const T (&tile)[ROWS][PITCH], int pixel, int column) {
      return *reinterpret_cast<const unsigned*>(&tile[at.slot * S_PAD + pixel][k + column + 2 * at.t]);
    };
    const int row = at.top + at.g;
    const unsigned a[4] = {pair(g_tile, row, 0), pair(g_tile, row + 8, 0), pair(g_tile, row, 8),
                           pair(g_tile, row + 8, 8)};
    if (at.half == 0) multiply(bias, a, column_of_ones, T{});
#pragma unroll
    for (int n = 0; n < S_PAD / 16; ++n) {
      const int column = (at.half * (S_PAD / 16) + n) * 8 + at.g;
      const unsigned b[2] = {pair(z_tile, column, 0), pair(z_tile, column, 8)};
      multiply(acc[n], a, b, T{});
    }
  }
}

template <typename T>
union Eight {
  Vector vector;
  T t[8];
};

// Eight results plus addend(k), to memory.
template <typename T, typename Addend>
__device__ __forceinline__ void store(T* to, const float* result, Addend addend) {
  Eight<T> out;
#pragma unroll
  for (int k = 0; k < 8; ++k) narrow(result[k] + addend(k), out.t[k]);
  *reinterpret_cast<Vector*>(to) = out.vector;
}

// One block: TILE channels of one image, along one of the two axes; blocks 2k and 2k + 1 share their input.
template <typename T, int S_PAD>
__global__ void __launch_bounds__(THREADS) axial_mix(T* u, const T* z, const T* A, const T* a, const T* D, const T* d,
                                                     i64 C, i64 H, i64 W) {
  alignas(16) __shared__ T tile[ROWS][PITCH];
  alignas(16) __shared__ float result[ROWS][TILE + 4];
  constexpr int LINES = ROWS / S_PAD;

  const bool width = blockIdx.x % 2 == 0;
  const int tiles = (int)((C + TILE - 1) / TILE), item = blockIdx.x / 2;
  const i64 image = (i64)(item / tiles) * H * W;
  const int channel = item % tiles * TILE, channels = min((int)C - channel, TILE);
  const Lines lines = lines_along(width, (int)H, (int)W);
  const T* from = z + image * C + channel;
  T* copied = u + image * 3 * C + channel;  // with 32-bit offsets the compiler splits its stores: counts.json
  T* mixed = copied + (width ? C : 2 * C);
  const T* bias = width ? a : d;

  unsigned matrix[S_PAD / 16][4];
  load_matrix<S_PAD, false>(matrix, width ? A : D, lines.length);

  Vector even[OWN], odd[OWN];
  fetch<S_PAD>(even, from, (int)C, lines, 0, channels);
  fetch<S_PAD>(odd, from, (int)C, lines, LINES, channels);
  const auto step = [&](Vector (&held)[OWN], int first) {
    put(tile, held);
    __syncthreads();
    if (width)
      each_vector<S_PAD>(lines, first, channels, [&](int k, int, int column, int pixel) {
        if (pixel >= 0) *reinterpret_cast<Vector*>(copied + (i64)pixel * 3 * C + column) = held[k];
      });
    fetch<S_PAD>(held, from, (int)C, lines, first + 2 * LINES, channels);
    mix_tile<S_PAD>(result, tile, matrix);
    __syncthreads();
    each_vector<S_PAD>(lines, first, channels, [&](int, int row, int column, int pixel) {
      if (pixel < 0) return;
      const float b = widen(bias[row % S_PAD]);
      store(mixed + (i64)pixel * 3 * C + column, &result[row][column], [&](int) { return b; });
    });
  };
  for (int first = 0; first < lines.count; first += 2 * LINES) {
    step(even, first);
    if (first + LINES < lines.count) step(odd, first + LINES);
  }
}

struct Held {
  Vector g[OWN], z[OWN], sum[OWN];
};

// dz, and partial[slot] = (dA, da, dD, dd) as float, summed over the block's items; gridDim.x * 64 / S_PAD slots. An
// item is TILE channels of one image, first along the width, then along the height on top of that. z_stride: from pixel
// to pixel of z, in elements. A bias is one more column of its matrix, with ones for z.
template <typename T, int S_PAD>
__global__ void __launch_bounds__(THREADS, 2) axial_backward(T* dz, float* partial, const T* g, const T* z, const T* A,
                                                          const T* D, i64 z_stride, i64 B, i64 C, i64 H, i64 W) {
  alignas(16) __shared__ T g_tile[ROWS][PITCH];
  alignas(16) __shared__ T z_tile[ROWS][PITCH];
  alignas(16) __shared__ T sum_tile[ROWS][PITCH];
  alignas(16) __shared__ float result[ROWS][TILE + 4];
  constexpr int LINES = ROWS / S_PAD;
  const Place<S_PAD> at;

  T one{}, zero{};
  narrow(1.0f, one);
  const unsigned ones = at.g == 0 ? pack(one, one) : pack(zero, zero);
  const unsigned column_of_ones[2] = {ones, ones};

  float acc[2][S_PAD / 16][4] = {}, bias[2][4] = {};
  const int tiles = (int)((C + TILE - 1) / TILE);
  for (i64 item = blockIdx.x; item < B * tiles; item += gridDim.x) {
    const i64 image = item / tiles * H * W;
    const int channel = (int)(item % tiles) * TILE, channels = min((int)C - channel, TILE);
    const T* g_from = g + image * 3 * C + channel;
    const T* z_from = z + image * z_stride + channel;
    T* to = dz + image * C + channel;
#pragma unroll
    for (int axis = 0; axis < 2; ++axis) {
      const Lines lines = lines_along(axis == 0, (int)H, (int)W);
      const T* mixed = g_from + (axis + 1) * C;
      const T* sum = axis == 0 ? g_from : to;  // what the result is added to
      const int sum_stride = (int)(axis == 0 ? 3 * C : C);
      unsigned matrix[S_PAD / 16][4];
      load_matrix<S_PAD, true>(matrix, axis == 0 ? A : D, lines.length);

      Held even, odd;
      const auto fetch_all = [&](Held& held, int first) {
        fetch<S_PAD>(held.g, mixed, 3 * (int)C, lines, first, channels);
        fetch<S_PAD>(held.z, z_from, (int)z_stride, lines, first, channels);
        fetch<S_PAD>(held.sum, sum, sum_stride, lines, first, channels);
      };
      const auto step = [&](Held& held, int first) {
        put(g_tile, held.g);
        put(z_tile, held.z);
        put(sum_tile, held.sum);
        __syncthreads();
        fetch_all(held, first + 2 * LINES);
        mix_tile<S_PAD>(result, g_tile, matrix);
        gram_tile<S_PAD>(acc[axis], bias[axis], g_tile, z_tile, column_of_ones);
        __syncthreads();
        each_vector<S_PAD>(lines, first, channels, [&](int, int row, int column, int pixel) {
          Eight<T> addend;
          addend.vector = *reinterpret_cast<const Vector*>(&sum_tile[row][column]);
          const auto plus = [&](int n) { return widen(addend.t[n]); };
          if (pixel >= 0) store(to + pixel * (int)C + column, &result[row][column], plus);
        });
      };
      fetch_all(even, 0);
      fetch_all(odd, LINES);
      for (int first = 0; first < lines.count; first += 2 * LINES) {
        step(even, first);
        if (first + LINES < lines.count) step(odd, first + LINES);
      }
      __syncthreads();  // the second axis reads what the first has written, the next item's tiles come after this one's
    }
  }

  float* out = partial + (blockIdx.x * LINES + at.slot) * (W * W + W + H * H + H);
#pragma unroll
  for (int axis = 0; axis < 2; ++axis) {
    const int side = (int)(axis == 0 ? W : H);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int row = at.top + at.g + part / 2 * 8;
      if (row >= side) continue;
#pragma unroll
      for (int n = 0; n < S_PAD / 16; ++n) {
        const int column = (at.half * (S_PAD / 16) + n) * 8 + 2 * at.t + part % 2;
        if (column < side) out[row * side + column] = acc[axis][n][part];
      }
      if (at.half == 0 && at.t == 0 && part % 2 == 0) out[side * side + row] = bias[axis][part];
    }
    out += side * side + side;
  }
}
