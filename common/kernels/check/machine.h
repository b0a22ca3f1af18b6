// A GPU for checking kernels, not for speed. `translate.py` turns PTX into C++ functions over this file.
//
// A thread of a block runs until it waits for its warp (mma, ldmatrix) or its block (bar.sync). Everything that makes
// a kernel wrong on some GPU or in some schedule is an error here, whatever the order in which threads run:
//
//   memory       an access outside the tensors of the launch and the block's shared arrays, or not aligned to its width;
//                a write to an input
//   initialised  a read of shared memory or of an output before it was written; an output not written, or too often
//   race         two accesses to one place, one of them a write, by two threads of a block without a barrier of the
//                block in between, or by two blocks
//   convergence  a barrier that not all threads of a block reach, an .aligned instruction that not all lanes of a warp
//                reach

#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using f32 = float;
using f64 = double;

// Registers hold bits; an instruction's type says what they mean.
template <typename T>
T as(u64 bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
u64 bits(T value) {
  if constexpr (std::is_integral_v<T>) return (u64)(s64)value;
  u64 all = 0;
  std::memcpy(&all, &value, sizeof value);
  return all;
}

template <typename T>
T shift_left(T a, u32 by) { return by < 8 * sizeof(T) ? a << by : 0; }
template <typename T>
T shift_right(T a, u32 by) { return a >> std::min<u32>(by, 8 * sizeof(T) - 1) >> (by >= 8 * sizeof(T) ? 1 : 0); }
inline u32 funnel_left(u32 low, u32 high, u32 by) { return (((u64)high << 32 | low) << by) >> 32; }
inline u32 funnel_right(u32 low, u32 high, u32 by) { return ((u64)high << 32 | low) >> by; }
inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 out = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 nibble = selector >> 4 * k & 15;
    const u8 byte = both >> 8 * (nibble & 7);
    out |= (u32)(u8)(nibble & 8 ? (s32)(int8_t)byte >> 7 : byte) << 8 * k;
  }
  return out;
}
inline u32 insert_bits(u32 a, u32 b, u32 at, u32 length) {
  const u64 mask = (((u64)1 << std::min(length, 32u)) - 1) << std::min(at, 32u);
  return (u32)((b & ~mask) | (((u64)a << std::min(at, 32u)) & mask));
}
inline f32 from_half(u16 a) { return (f32)as<_Float16>(a); }
inline u16 to_half(f32 a) { return (u16)bits((_Float16)a); }
inline f32 from_bfloat(u16 a) { return as<f32>((u64)a << 16); }
inline u16 to_bfloat(f32 a) {
  if (a != a) return 0x7fff;
  const u32 all = (u32)bits(a);
  return (all + 0x7fff + ((all >> 16) & 1)) >> 16;
}

// Last accesses to one place: 2 bytes of a tensor or a byte of shared memory.
struct Shadow {
  int writer_block = -1, writer_thread = 0, writer_epoch = 0;
  int reader_block = -1, reader_thread = 0, reader_epoch = 0;
  bool many_blocks = false, many_threads = false;  // readers; threads: of reader_block in reader_epoch
  int writes = 0;
};

struct Span {  // of a tensor, as the caller describes it
  u64 begin, bytes;
  const u8* valid;  // one for every 2 bytes: holes of a strided tensor are zero
  int written;      // 0: an input; else how often each place may be written
  int initialised;
};

struct Array {
  u64 begin, bytes;
};

enum Wait { READY, WARP, BLOCK, DONE };
enum Collective { MMA_F16, MMA_BF16, LDMATRIX };

struct Thread {
  int state = 0, id = 0, line = 0;
  Wait wait = READY;
  int collective = 0, matrices = 0;
  bool transposed = false;
  u32 in[10], out[4];
  std::vector<u64> registers;
};

struct Kernel {
  void (*step)(Thread&, u64* registers);
  int registers;
  std::vector<Array> shared;
};

struct Machine {
  u64 args[64];
  std::vector<Span> spans;
  std::vector<std::vector<Shadow>> shadows;
  std::vector<u8> memory;  // shared
  std::vector<Shadow> memory_shadow;
  const Kernel* kernel;
  std::vector<Thread> threads;
  int block, blocks, block_size, epoch, order;
  Thread* running;
  std::string errors;
  int count;
  // when counting, the sectors of 32 bytes that a request of a warp touches: by tensor and whether it writes, then by
  // line, block, warp and how often the line ran
  bool counting;
  std::map<std::pair<int, int>, int> occurrences;
  std::map<std::pair<int, bool>, std::map<std::tuple<int, int, int, int>, std::vector<u64>>> sectors;

  void error(const char* kind, const char* what, int line) {
    if (++count > 20) return;
    char text[256];
    std::snprintf(text, sizeof text, "%d\t%s\t%s, block %d thread %d\n", line, kind, what, block, running->id);
    errors += text;
  }

  void touch(Shadow& s, bool write, int thread, int line) {
    const auto ours = [&](int other_block, int other_epoch, int other_thread) {
      return other_block == block && (other_epoch != epoch || other_thread == thread);
    };
    if (s.writer_block >= 0 && !ours(s.writer_block, s.writer_epoch, s.writer_thread))
      error("race", write ? "written by two" : "read while another writes", line);
    if (write) {
      const bool other_reader =
          s.reader_block >= 0 && (s.many_blocks || !ours(s.reader_block, s.reader_epoch, s.reader_thread) ||
                                  (s.reader_epoch == epoch && s.many_threads));
      if (other_reader) error("race", "written while another reads", line);
      s.writer_block = block, s.writer_epoch = epoch, s.writer_thread = thread;
      ++s.writes;
      return;
    }
    if (s.reader_block >= 0 && s.reader_block != block) s.many_blocks = true;
    if (s.reader_block != block || s.reader_epoch != epoch) {
      s.reader_block = block, s.reader_epoch = epoch, s.reader_thread = thread, s.many_threads = false;
    } else if (s.reader_thread != thread) {
      s.many_threads = true;
    }
  }

  // nullptr where the access is not allowed; the read is then zero and the write is dropped
  [[gnu::noinline]] u8* global(u64 at, int width, bool write, int line) {
    if (at % width) return error("memory", "address not aligned", line), nullptr;
    for (size_t k = 0; k < spans.size(); ++k) {
      const Span& span = spans[k];
      if (at < span.begin || at + width > span.begin + span.bytes) continue;
      if (write && !span.written) return error("memory", "an input written", line), nullptr;
      if (counting) {
        auto& seen = sectors[{k, write}][{line, block, running->id / 32, occurrences[{line, running->id}]++}];
        if (std::find(seen.begin(), seen.end(), at / 32) == seen.end()) seen.push_back(at / 32);
      }
      for (u64 place = (at - span.begin) / 2; place < (at - span.begin + width) / 2; ++place) {
        if (!span.valid[place]) return error("memory", "outside the tensor's elements", line), nullptr;
        Shadow& s = shadows[k][place];
        if (!write && !span.initialised && !s.writes) error("initialised", "output read before it is written", line);
        touch(s, write, running->id, line);
      }
      return (u8*)at;
    }
    return error("memory", write ? "written outside all tensors" : "read outside all tensors", line), nullptr;
  }

  [[gnu::noinline]] u8* shared(u64 at, int width, bool write, int line, int thread = -1) {
    if (at % width) return error("memory", "shared address not aligned", line), nullptr;
    for (const Array& array : kernel->shared) {
      if (at < array.begin || at + width > array.begin + array.bytes) continue;
      for (u64 place = at; place < at + width; ++place) {
        Shadow& s = memory_shadow[place];
        if (!write && !s.writes) return error("initialised", "shared memory read before it is written", line), nullptr;
        touch(s, write, thread < 0 ? running->id : thread, line);
      }
      return &memory[at];
    }
    return error("memory", "outside the shared arrays", line), nullptr;
  }

  template <typename T, int N>
  [[gnu::noinline]] void load(u8* from, u64 (&to)[N]) {
    for (int k = 0; k < N; ++k) {
      T value{};
      if (from) std::memcpy(&value, from + k * sizeof(T), sizeof value);
      to[k] = bits(value);
    }
  }

  template <typename T, int N>
  [[gnu::noinline]] void store(u8* to, const u64 (&from)[N]) {
    for (int k = 0; to && k < N; ++k) std::memcpy(to + k * sizeof(T), &from[k], sizeof(T));
  }

  // Fragments as the PTX manual lays them out. g = lane / 4, t = lane % 4.
  void mma(Thread* lanes) {  // mma.m16n8k16.row.col, sums in double, rounded once
    static f64 a[16][16], b[16][8];
    const auto value = [&](u32 both, int which) -> f64 {
      const u16 half = both >> 16 * which;
      return lanes->collective == MMA_F16 ? from_half(half) : from_bfloat(half);
    };
    for (int lane = 0; lane < 32; ++lane)
      for (int which = 0; which < 2; ++which) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r)  // a: rows g, g + 8; columns 2t, 2t + 1, then 8 more
          a[g + r % 2 * 8][2 * t + which + r / 2 * 8] = value(lanes[lane].in[r], which);
        for (int r = 0; r < 2; ++r) b[2 * t + which + r * 8][g] = value(lanes[lane].in[4 + r], which);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        f64 sum = as<f32>(lanes[lane].in[6 + r]);
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[lane].out[r] = (u32)bits((f32)sum);
      }
  }

  void ldmatrix(Thread* lanes) {  // lane 8m + k points at row k of matrix m; 16 bytes a row
    for (int m = 0; m < lanes->matrices; ++m) {
      u16 matrix[8][8] = {};
      for (int row = 0; row < 8; ++row) {
        Thread& lane = lanes[m * 8 + row];
        running = &lane;
        u8* from = shared(lane.in[0], 16, false, lane.line);
        // another lane receives what this one points at
        if (from) shared(lane.in[0], 16, false, lane.line, lane.id ^ 1);
        if (from) std::memcpy(matrix[row], from, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const u16 low = lanes->transposed ? matrix[2 * t][g] : matrix[g][2 * t];
        const u16 high = lanes->transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
        lanes[lane].out[m] = (u32)high << 16 | low;
      }
    }
  }

  bool run_warp(Thread* lanes, int lanes_present) {
    for (int k = 0; k < lanes_present; ++k)
      if (lanes[k].wait != WARP || lanes[k].line != lanes->line) return false;
    if (lanes_present < 32) return false;
    lanes->collective == LDMATRIX ? ldmatrix(lanes) : mma(lanes);
    for (int k = 0; k < 32; ++k) lanes[k].wait = READY;
    return true;
  }

  void run_block(std::mt19937& random) {
    std::fill(memory.begin(), memory.end(), 0xff);
    std::fill(memory_shadow.begin(), memory_shadow.end(), Shadow{});
    occurrences.clear();
    epoch = 0;
    std::vector<int> turns(block_size);
    std::iota(turns.begin(), turns.end(), 0);
    if (order == 1) std::reverse(turns.begin(), turns.end());
    for (Thread& t : threads) {
      t.state = 0, t.wait = READY;
      std::fill(t.registers.begin(), t.registers.end(), 0);
    }
    while (true) {
      if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
      for (int id : turns) {
        Thread& t = threads[id];
        running = &t;
        if (t.wait == READY) kernel->step(t, t.registers.data());
      }
      bool progress = false;
      for (int first = 0; first < block_size; first += 32)
        progress |= run_warp(&threads[first], std::min(32, block_size - first));
      if (progress) continue;
      const Thread& first = threads[0];
      if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.wait == DONE; })) return;
      for (Thread& t : threads) {
        running = &t;
        if (t.wait == WARP) return error("convergence", "not all lanes of the warp come here", t.line);
        if (t.wait != first.wait || t.line != first.line)
          return error("convergence", "not all threads of the block come here", std::max(t.line, first.line));
      }
      ++epoch;
      for (Thread& t : threads) t.wait = READY;
    }
  }

  int run(const Kernel& which, int grid, int size, const u64* given, int given_count, int order_of_threads) {
    kernel = &which, blocks = grid, block_size = size, order = order_of_threads;
    std::copy(given, given + given_count, args);
    errors.clear(), count = 0, sectors.clear();
    shadows.clear();
    for (const Span& span : spans) shadows.emplace_back(span.bytes / 2);
    const u64 end = which.shared.empty() ? 0 : which.shared.back().begin + which.shared.back().bytes;
    memory.resize(end), memory_shadow.resize(end);
    threads.resize(size);
    for (int k = 0; k < size; ++k) threads[k].id = k, threads[k].registers.resize(which.registers);
    std::mt19937 random(order);
    std::vector<int> turns(grid);
    std::iota(turns.begin(), turns.end(), 0);
    if (order == 1) std::reverse(turns.begin(), turns.end());
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
    for (int k : turns) {
      block = k;
      run_block(random);
      if (count) return count;
    }
    running = &threads[0];
    for (size_t k = 0; k < spans.size(); ++k)
      for (u64 place = 0; spans[k].written && place < spans[k].bytes / 2; ++place) {
        const int writes = shadows[k][place].writes;
        if (spans[k].valid[place] && !spans[k].initialised && !writes) error("initialised", "output not written", 0);
        if (writes > spans[k].written) error("initialised", "output written more often than it should be", 0);
        if (count) return count;
      }
    return count;
  }
};

inline Machine machine;

inline void wait_for_block(Thread& t, int line) { t.wait = BLOCK, t.line = t.state = line; }
inline void wait_for_warp(Thread& t, int line, int collective) {
  t.wait = WARP, t.line = t.state = line, t.collective = collective;
}
