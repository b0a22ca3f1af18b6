// The spatial shift of ShiftViT. README.md of this folder: formula, layouts, bytes, instructions.
//
//   out[n, c, i, j] = in[n, c, i + di(c), j + dj(c)], zero where that lies outside the image;
//   in = x, or in shift_add x + r, rounded once to T as PyTorch does.
//
// A shift moves bits, so without r (R = void) T is an unsigned integer of the element's size.
// The backward pass is the same kernel with -step.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using i64 = long long;
using u32 = unsigned;

// Division by a number that the host knows: its multiplier in the low and its shift in the high half. n < 2^31.
struct Divisor {
  u32 multiplier, shift;
  __device__ __forceinline__ Divisor(i64 packed) : multiplier((u32)packed), shift((u32)(packed >> 32)) {}
};

__device__ __forceinline__ u32 divide(u32 n, const Divisor& by) { return (__umulhi(n, by.multiplier) + n) >> by.shift; }

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

struct alignas(16) Vector {
  u32 w[4];
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

template <typename T>
union Elements {
  Pack<T, 16 / sizeof(T)> elements;
  Vector vector;
  __device__ __forceinline__ Elements() {}
};

template <typename T, typename R>
__device__ __forceinline__ Vector read_vector(const T* x, const R* r, u32 number) {
  Elements<T> both;
  both.elements = read<16 / sizeof(T)>(x, r, (i64)number * (16 / sizeof(T)));
  return both.vector;
}

// What one direction does: element or pixel number t takes from t + jump if that is in the same line, or for up and
// down in the same image: lines and images are `period` long, so (t % period) + jump must be below it.
struct Move {
  int jump;
  u32 period;
  Divisor by_period;
};

// group: 0 left, 1 right, 2 up, 3 down. step_w pixels along the width, step_h along the height, times W.
__device__ __forceinline__ Move move_of(u32 group, int step_w, int step_h, u32 W, u32 plane, const Divisor& by_W,
                                        const Divisor& by_plane) {
  const bool along_width = group < 2;
  const int jump = along_width ? step_w : step_h;
  return {group % 2 ? -jump : jump, along_width ? W : plane, along_width ? by_W : by_plane};
}

// The V elements from `first` on after the move, all of one group; channels first, so that an element's neighbour in
// the row is its neighbour in memory. `in` has `vectors` whole vectors. The source is V elements from first + jump on:
// two aligned vectors and a funnel, whatever the jump.
template <typename T, typename R>
__device__ __forceinline__ Vector moved_vector(const T* x, const R* r, u32 vectors, u32 first, const Move& m) {
  constexpr int V = 16 / sizeof(T);
  const int from = (int)first + m.jump;
  const int low = from >> (V == 8 ? 3 : V == 4 ? 2 : 1);
  const u32 bytes = from % (u32)V * sizeof(T);
  u32 w[8] = {};
  if ((u32)low < vectors) *reinterpret_cast<Vector*>(w) = read_vector(x, r, low);
  if (bytes && (u32)(low + 1) < vectors) *reinterpret_cast<Vector*>(w + 4) = read_vector(x, r, low + 1);
  if (bytes & 8)
#pragma unroll
    for (int k = 0; k < 6; ++k) w[k] = w[k + 2];
  if (bytes & 4)
#pragma unroll
    for (int k = 0; k < 5; ++k) w[k] = w[k + 1];

  u32 t = first - divide(first, m.by_period) * m.period;
  Vector out;
#pragma unroll
  for (int k = 0; k < 4; ++k) out.w[k] = sizeof(T) == 2 ? __funnelshift_r(w[k], w[k + 1], 8 * (bytes & 2)) : w[k];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const bool inside = t + m.jump < m.period;
    if (sizeof(T) == 2 && !inside) out.w[k / 2] &= k % 2 ? 0x0000ffff : 0xffff0000;
    if (sizeof(T) == 4 && !inside) out.w[k] = 0;
    if (sizeof(T) == 8 && !inside) out.w[2 * k % 4] = out.w[2 * k % 4 + 1] = 0;
    if (++t == m.period) t = 0;
  }
  return out;
}

// x, r and out dense in memory in the same order, (n, c, i, j) or with CHANNELS_LAST (n, i, j, c), aligned to whole
// vectors of V elements and `vectors` long, fewer than 2^30 elements. One thread writes one vector. In memory, groups
// of `run` elements follow each other within a cycle (of C with channels last, else of an image), `moving` elements of
// a cycle move. Channels last, C is a multiple of V.
template <typename T, typename R, bool CHANNELS_LAST>
__global__ void __launch_bounds__(256) dense(T* out, const T* x, const R* r, i64 vectors, i64 cycle, i64 run,
                                             i64 moving, i64 W, i64 plane, i64 step_w, i64 step_h, i64 by_cycle,
                                             i64 by_run, i64 by_W, i64 by_plane) {
  constexpr int V = 16 / sizeof(T);
  const u32 number = blockIdx.x * 256 + threadIdx.x;
  if (number >= (u32)vectors) return;
  const u32 first = number * V;

  const u32 whole = divide(first, by_cycle);
  const u32 offset = first - whole * (u32)cycle;  // within the cycle
  const auto move_in = [&](u32 group) {
    return move_of(group, (int)step_w, (int)step_h, (u32)W, (u32)plane, by_W, by_plane);
  };

  const bool stays = offset >= (u32)moving;
  const u32 group = divide(offset, by_run);
  const u32 end = stays ? (u32)cycle : min((group + 1) * (u32)run, (u32)moving);
  if (offset + V <= end) {  // one group
    Vector moved{};
    if (stays) {
      moved = read_vector(x, r, number);
    } else if (CHANNELS_LAST) {
      const Move m = move_in(group);
      const u32 t = whole - divide(whole, m.by_period) * m.period;
      if (t + m.jump < m.period) moved = read_vector(x, r, number + m.jump * ((int)cycle / V));
    } else {
      moved = moved_vector(x, r, (u32)vectors, first, move_in(group));
    }
    reinterpret_cast<Vector*>(out)[number] = moved;
    return;
  }
#pragma unroll 1
  for (u32 at = first; at < first + V; ++at) {
    const u32 whole = divide(at, by_cycle), offset = at - whole * (u32)cycle;
    T value;
    if (offset >= (u32)moving) {
      value = read<1>(x, r, at).v[0];
    } else {
      const Move m = move_in(divide(offset, by_run));
      const u32 place = CHANNELS_LAST ? whole : at;
      const u32 t = place - divide(place, m.by_period) * m.period;
      value = T{};
      if (t + m.jump < m.period) value = read<1>(x, r, (int)at + m.jump * (CHANNELS_LAST ? (int)cycle : 1)).v[0];
    }
    out[at] = value;
  }
}

// In place, x dense with channels first and aligned to whole vectors: one block owns `vectors` vectors, which are whole
// planes of one group, so no other block reads what it writes. It takes them in order, from the end where the data
// comes from smaller indices: what a vector takes then lies in itself and in vectors still to come. A chunk is read
// into registers and, behind a barrier, written. Later chunks read only behind the end of this one, so one barrier per
// chunk is enough, for planes of any size. image: elements from image to image. An image has `blocks` blocks, a group
// `group_blocks`.
constexpr int OWN_VECTORS = 4;

template <typename T>
__global__ void __launch_bounds__(256) in_place_planes(T* x, i64 vectors, i64 image, i64 blocks, i64 group_blocks,
                                                       i64 W, i64 plane, i64 step_w, i64 step_h, i64 by_W,
                                                       i64 by_plane) {
  constexpr int V = 16 / sizeof(T);
  const u32 n = blockIdx.x / (u32)blocks, k = blockIdx.x - n * (u32)blocks;
  const Move m = move_of(k / (u32)group_blocks, (int)step_w, (int)step_h, (u32)W, (u32)plane, by_W, by_plane);
  T* base = x + n * image + (i64)k * vectors * V;
  const u32 count = (u32)vectors;

  for (u32 start = 0; start < count; start += blockDim.x * OWN_VECTORS) {
    Vector held[OWN_VECTORS];
#pragma unroll
    for (int k = 0; k < OWN_VECTORS; ++k) {
      const u32 number = start + k * blockDim.x + threadIdx.x, place = m.jump < 0 ? count - 1 - number : number;
      if (number < count) held[k] = moved_vector(base, (const void*)nullptr, count, place * V, m);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < OWN_VECTORS; ++k) {
      const u32 number = start + k * blockDim.x + threadIdx.x, place = m.jump < 0 ? count - 1 - number : number;
      if (number < count) reinterpret_cast<Vector*>(base)[place] = held[k];
    }
  }
}

// Any strides (in elements) and sizes, one element per thread. A single axis has fewer than 2^29 entries.
struct Shape {
  int C, H, W, group, step;
};

struct Direction {
  int di, dj;
};

__device__ __forceinline__ Direction direction_of(const Shape& s, int c) {
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

  const Direction m = direction_of(s, c);
  const int si = i + m.di, sj = j + m.dj;
  T value{};
  if (inside(s, si, sj))
    value = read<1>(x + n * xn + c * xc + si * xi + sj * xj, moved(r, n * rn + c * rc + si * ri + sj * rj), 0).v[0];
  out[n * on + c * oc + i * oi + j * oj] = value;
}

// In place, moving channels only, any strides. T is a word: one element, or with channels last 16 bytes of channels of one
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

  const Direction m = direction_of(s, word);
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
