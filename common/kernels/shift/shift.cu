// The spatial shift of ShiftViT. README.md of this folder: formula, layouts, bytes.
//
//   out[n, c, i, j] = in[n, c, i + di(c), j + dj(c)], zero where that lies outside the image;
//   in = x, or in shift_add x + r, rounded once to T as PyTorch does.
//
// A shift moves bits, so without r (R = void) T is an unsigned integer of the element's size.
// The backward pass is the same kernel with -step. Offsets are 64-bit; a single axis has fewer than 2^29 entries.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using i64 = long long;

struct Shape {
  int C, H, W, group, step;
};

struct Move {
  int di, dj;
};

__device__ __forceinline__ Move move_of(const Shape& s, int c) {
  if (c < s.group) return {0, s.step};
  if (c < 2 * s.group) return {0, -s.step};
  if (c < 3 * s.group) return {s.step, 0};
  if (c < 4 * s.group) return {-s.step, 0};
  return {0, 0};
}

__device__ __forceinline__ bool inside(const Shape& s, int i, int j) {
  return 0 <= i && i < s.H && 0 <= j && j < s.W;
}

// 64-bit division costs several times a 32-bit one, and indices rarely need it. a, b >= 0.
__device__ __forceinline__ i64 divide(i64 a, i64 b) {
  return ((a | b) >> 32) ? a / b : (i64)((unsigned)a / (unsigned)b);
}

__device__ __forceinline__ float widen(float a) { return a; }
__device__ __forceinline__ double widen(double a) { return a; }
__device__ __forceinline__ float widen(__half a) { return __half2float(a); }
__device__ __forceinline__ float widen(__nv_bfloat16 a) { return __bfloat162float(a); }

__device__ __forceinline__ void narrow(float a, float& out) { out = a; }
__device__ __forceinline__ void narrow(double a, double& out) { out = a; }
__device__ __forceinline__ void narrow(float a, __half& out) { out = __float2half_rn(a); }
__device__ __forceinline__ void narrow(float a, __nv_bfloat16& out) { out = __float2bfloat16_rn(a); }

template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

// V neighbouring elements of `in`, in one load each from x and r; `at` is a multiple of V.
template <int V, typename T, typename R>
__device__ __forceinline__ Pack<T, V> read(const T* x, const R* r, i64 at) {
  const auto a = *reinterpret_cast<const Pack<T, V>*>(x + at);
  const auto b = *reinterpret_cast<const Pack<R, V>*>(r + at);
  Pack<T, V> sum;
#pragma unroll
  for (int k = 0; k < V; ++k) narrow(widen(a.v[k]) + widen(b.v[k]), sum.v[k]);
  return sum;
}

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> read(const T* x, const void*, i64 at) {
  return *reinterpret_cast<const Pack<T, V>*>(x + at);
}

// x, r and out dense in memory in the same order, (n, c, i, j) or with CHANNELS_LAST (n, i, j, c), and aligned to
// whole vectors. One thread writes 16 bytes of out, elements first .. first + V - 1 in memory order. It reads
// 16 bytes too where all V elements come from one aligned place: channels that stay, and with channels last any
// V channels of one group. Otherwise element by element; neighbours hit the same cache lines.
template <typename T, typename R, bool CHANNELS_LAST>
__global__ void __launch_bounds__(256) dense(T* out, const T* x, const R* r, i64 total, i64 C, i64 H, i64 W,
                                             i64 group, i64 step) {
  constexpr int V = 16 / sizeof(T);
  const Shape s{(int)C, (int)H, (int)W, (int)group, (int)step};
  const i64 first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (first >= total) return;
  const bool whole = first + V <= total;

  int c, i, j;  // of element `first`
  if (CHANNELS_LAST) {
    const i64 pixel = divide(first, C), row = divide(pixel, W);
    c = (int)(first - pixel * C);
    j = (int)(pixel - row * W);
    i = (int)(row - divide(row, H) * H);
  } else {
    const i64 row = divide(first, W), plane = divide(row, H);
    j = (int)(first - row * W);
    i = (int)(row - plane * H);
    c = (int)(plane - divide(plane, C) * C);
  }
  const i64 stride = CHANNELS_LAST ? C : 1;  // from one pixel to the next
  Move m = move_of(s, c);
  i64 jump = (m.di * W + m.dj) * stride;

  bool together;  // the V elements come from one aligned vector, or are all zero
  if (CHANNELS_LAST) {
    const Move last = move_of(s, c + V - 1);
    together = c + V <= C && last.di == m.di && last.dj == m.dj && jump % V == 0;
  } else {
    const i64 left_in_image = ((C - c) * H - i) * W - j;
    together = c >= 4 * group && V <= left_in_image;
  }
  Pack<T, V> pack{};
  if (whole && together) {
    if (inside(s, i + m.di, j + m.dj)) pack = read<V>(x, r, first + jump);
    *reinterpret_cast<Pack<T, V>*>(out + first) = pack;
    return;
  }

#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (first + k < total && inside(s, i + m.di, j + m.dj)) pack.v[k] = read<1>(x, r, first + k + jump).v[0];
    const int before = c;
    if (CHANNELS_LAST) {
      if (++c == s.C) c = 0, ++j;
      if (j == s.W) j = 0, ++i;
      if (i == s.H) i = 0;
    } else {
      if (++j == s.W) j = 0, ++i;
      if (i == s.H) i = 0, ++c;
      if (c == s.C) c = 0;
    }
    if (c != before) {
      m = move_of(s, c);
      jump = (m.di * W + m.dj) * stride;
    }
  }
  if (whole) {
    *reinterpret_cast<Pack<T, V>*>(out + first) = pack;
  } else {
    for (int k = 0; k < V; ++k)
      if (first + k < total) out[first + k] = pack.v[k];
  }
}

// Any strides (in elements), one element per thread.
template <typename R>
__device__ __forceinline__ const R* moved(const R* r, i64 by) { return r + by; }
__device__ __forceinline__ const void* moved(const void* r, i64) { return r; }

template <typename T, typename R>
__global__ void __launch_bounds__(256) strided(T* out, const T* x, const R* r, i64 total, i64 C, i64 H, i64 W,
                                               i64 group, i64 step, i64 on, i64 oc, i64 oi, i64 oj, i64 xn, i64 xc,
                                               i64 xi, i64 xj, i64 rn, i64 rc, i64 ri, i64 rj) {
  const Shape s{(int)C, (int)H, (int)W, (int)group, (int)step};
  const i64 element = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= total) return;
  const i64 row = divide(element, W), plane = divide(row, H), n = divide(plane, C);
  const int j = (int)(element - row * W), i = (int)(row - plane * H), c = (int)(plane - n * C);

  const Move m = move_of(s, c);
  const int si = i + m.di, sj = j + m.dj;
  T value{};
  if (inside(s, si, sj))
    value = read<1>(x + n * xn + c * xc + si * xi + sj * xj, moved(r, n * rn + c * rc + si * ri + sj * rj), 0).v[0];
  out[n * on + c * oc + i * oi + j * oj] = value;
}

// In place, moving channels only. T is a word: one element, or with channels last 16 bytes of channels of one
// group; strides, `words` (moving words per pixel) and `group` count words.
//
// One block owns `width` words of one image and all their pixels, so no other block reads what it writes. It takes
// the pixels in order, from the end where the data comes from smaller indices: pixel number k always takes from
// pixel number k + |d|. A chunk is read into registers and, behind a barrier, written. Later chunks read only
// behind the end of this one, so one barrier per chunk is enough, for images of any size.
constexpr int PER_THREAD = 8;

template <typename T>
__global__ void __launch_bounds__(256) in_place(T* x, i64 words, i64 width, i64 H, i64 W, i64 group, i64 step,
                                                i64 sn, i64 sc, i64 si, i64 sj) {
  const Shape s{(int)words, (int)H, (int)W, (int)group, (int)step};
  const int w = (int)width, slices = (s.C + w - 1) / w;
  const int n = blockIdx.x / slices, slice = blockIdx.x - n * slices;
  const int lanes = blockDim.x / w, lane = threadIdx.x / w;
  const int word = slice * w + (threadIdx.x - lane * w);
  const bool active = word < s.C && lane < lanes;

  const Move m = move_of(s, word);
  const bool reversed = m.di < 0 || m.dj < 0;
  const i64 pixels = H * W, jump = m.di * si + m.dj * sj;
  T* base = x + n * sn + word * sc;

  for (i64 start = 0; start < pixels; start += lanes * PER_THREAD) {
    T value[PER_THREAD];
    T* target[PER_THREAD];
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
      const i64 number = start + k * lanes + lane;
      value[k] = T{};
      target[k] = nullptr;
      if (active && number < pixels) {
        const i64 pixel = reversed ? pixels - 1 - number : number;
        const int i = (int)divide(pixel, W), j = (int)(pixel - i * W);
        target[k] = base + i * si + j * sj;
        if (inside(s, i + m.di, j + m.dj)) value[k] = target[k][jump];
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k)
      if (target[k]) *target[k] = value[k];
  }
}
