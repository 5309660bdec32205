// A CUDA machine on a CPU: blocks are threads of the operating system, their CUDA threads fibers. See __init__.py.

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fibers.hpp"
#include "memory.hpp"
#include "ptx.cuh"
#include "races.hpp"

namespace machine {

constexpr int WARP = 32, MOST_WARPS = 32, NAMED = 16, MOST_CLUSTER = 16;
constexpr std::size_t PAGE = 4096, STACK = 128 << 10, FENCE = 4096;
constexpr u8 POISON = 0xff;                               // NaN as float16 and float32
constexpr u32 STATIC_WINDOW = 1u << 23, PEER = 1u << 31;  // of shared addresses

// ---- what runs

struct Copy {
  u8* to;
  const u8* from;  // null: zeros
};

struct Fiber {
  u32 thread, in_warp;
  void* stack_pointer;
  Warp* warp;
  const char* what;  // it waits in
  Collective work;
  u32 mask;
  bool waited;       // for the kernel in front
  bool arrived;      // at the cluster's barrier, and has not waited
  bool with_memory;  // what was written before it arrived is seen by who waits
  u64 phase, waits;  // of it
  Moment now;
  u32 team;  // the named barrier at which it arrived last
  std::vector<Copy> copies;
  std::vector<std::size_t> groups;  // ends of those that were committed, in `copies`
};

struct Warp {
  Exchange exchanges[WARP];
  Fiber lanes[WARP];
  u32 runnable, waiting, gone, in_cluster_wait;
  int index;
};

struct Barrier {
  int arrived, threads;
  u32 waiting[MOST_WARPS];
};

struct Cluster {
  std::mutex lock;
  std::condition_variable changed;
  Block* blocks[MOST_CLUSTER] = {};
  int size = 1, threads = 0, unfinished = 0, asleep = 0;
  int arrived = 0, left = 0, gone = 0;  // left: of those that have arrived; gone: without having to

  u64 phase = 0;
  bool failed = false;

  void complete_if_all() {
    if (arrived && arrived + gone == threads) {
      gone += left;
      arrived = left = asleep = 0;
      phase++;
      changed.notify_all();
    }
  }
};

enum Copies { LATE = 0, AT_ONCE = 1, EITHER = 2 };

struct Request {
  const Entry* entry;
  void* (*touch)();
  u32 grid[3];
  u32 threads;
  u64 shared;
  void* const* arguments;
  u64 seed;
  u32 number, chain;  // of this launch, and of the first one that may still be under way until wait_for_previous
  int early, workers, copies;
  char* error;
  u64 error_size;
};

struct Launch {
  const Request& request;
  int blocks, cluster_size;
  std::vector<Writer> atomics;  // by blocks: the last one on the device's memory
  std::vector<int> order;       // of clusters
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::atomic<int> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;

  explicit Launch(const Request& request) : request(request) {}

  void fail(const std::string& message) {
    std::lock_guard guard(lock);
    if (failed.exchange(true)) return;
    std::snprintf(request.error, request.error_size, "%s: %s", request.entry->name, message.c_str());
  }
};

struct Block {
  Launch* launch;
  Cluster* cluster;
  int rank, number;
  uint3 index;
  std::vector<std::unique_ptr<Warp>> warps;  // as many as any block had
  int warp_count, live, current;
  u32 ready;  // warps with runnable lanes
  Barrier barriers[NAMED];
  bool waited, failed, finished;
  u64 cluster_waits, last_peer_access;
  u8* dynamic;
  std::size_t dynamic_size;
  u8* fixed;  // static shared memory
  std::size_t fixed_size;
  std::vector<Unit> units;  // of both, dynamic first
  std::size_t static_place() const { return (dynamic_size + 15) / 16 * 16; }
  u32 first_epoch;
  std::uintptr_t stacks, stacks_end, module, module_end;
  std::uintptr_t where;  // in the module, of what a lane does now
  void* main_stack;
  u64 random;
  u32 favourites;

  u32 draw(u32 below) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return u32((random >> 32) * below >> 32);
  }
  void wake(Warp& warp, u32 lanes) {
    warp.runnable |= lanes;
    if (warp.runnable) ready |= 1u << warp.index;
  }
};

static Memory memory;
// Where every access looks first: at a fixed place, not where __tls_get_addr finds it.
#define NEAR static __thread __attribute__((tls_model("initial-exec")))
NEAR Block* block_here = nullptr;
NEAR Fiber* fiber_here = nullptr;
NEAR Region* last_region = nullptr;
NEAR u64 last_version = 0;

static Fiber& me() { return *fiber_here; }

static int nth_bit(u32 bits, u32 n) {
  while (n--) bits &= bits - 1;
  return __builtin_ctz(bits);
}

// The next lane to run: of the same warp while there are any, or, with a seed, anyone.
static Fiber* pick(Block& b) {
  if (!b.ready) return nullptr;
  int warp = b.current, lane;
  if (b.launch->request.seed) {
    // Some warps are ahead of others for a while.
    if (b.draw(64) == 0) b.favourites = b.draw(~0u);
    const u32 among = b.ready & b.favourites ? b.ready & b.favourites : b.ready;
    warp = nth_bit(among, b.draw(__builtin_popcount(among)));
    lane = nth_bit(b.warps[warp]->runnable, b.draw(__builtin_popcount(b.warps[warp]->runnable)));
  } else {
    if (!(b.ready >> warp & 1)) warp = __builtin_ctz(b.ready);
    lane = __builtin_ctz(b.warps[warp]->runnable);
  }
  Warp& w = *b.warps[warp];
  b.current = warp;
  w.runnable &= ~(1u << lane);
  if (!w.runnable) b.ready &= ~(1u << warp);
  return &w.lanes[lane];
}

static void switch_out() {
  Block& b = *block_here;
  Fiber& self = me();
  Fiber* const next = pick(b);
  if (next == &self) return;
  fiber_here = next;
  machine_switch(&self.stack_pointer, next ? next->stack_pointer : b.main_stack);
}

[[noreturn]] static void fail(const char* format, ...) {
  char text[512];
  va_list rest;
  va_start(rest, format);
  std::vsnprintf(text, sizeof text, format, rest);
  va_end(rest);
  Block& b = *block_here;
  char place[96], where[32] = "";
  std::snprintf(place, sizeof place, "block (%u, %u, %u), thread %u: ", b.index.x, b.index.y, b.index.z,
                fiber_here->thread);
  // Behind the call that led here.
  if (b.where >= b.module && b.where < b.module_end)
    std::snprintf(where, sizeof where, " [+0x%zx]", std::size_t(b.where - b.module - 1));
  b.launch->fail(std::string(place) + text + where);
  b.failed = true;
  void* nowhere;
  machine_switch(&nowhere, b.main_stack);
  __builtin_unreachable();
}

#define NOTE_PLACE() (block_here->where = std::uintptr_t(__builtin_return_address(0)))

static void wait_in(const char* what) {
  me().what = what;
  switch_out();
}

// With a seed, who could go on may have to let others go first.
static void maybe_yield() {
  Block& b = *block_here;
  if (!b.launch->request.seed || b.draw(4)) return;
  Fiber& self = me();
  b.wake(*self.warp, 1u << self.in_warp);
  switch_out();
}

// ---- collectives

extern "C" u32 machine_thread() { return fiber_here->thread; }
extern "C" uint3 machine_block() { return block_here->index; }
extern "C" uint3 machine_grid() {
  const u32* const grid = block_here->launch->request.grid;
  return {grid[0], grid[1], grid[2]};
}
extern "C" u32 machine_threads() { return block_here->launch->request.threads; }

extern "C" Exchange* machine_exchange() { return &me().warp->exchanges[fiber_here->in_warp]; }

extern "C" Exchange* machine_meet(u32 mask, const char* what, Collective work) {
  NOTE_PLACE();
  Fiber& self = me();
  Warp& w = *self.warp;
  const u32 own = 1u << self.in_warp;
  if (!(mask & own)) fail("%s with a mask, %08x, that lacks the lane itself", what, mask);
  if (w.gone & mask) fail("%s with lanes that have left: mask %08x, gone %08x", what, mask, w.gone);
  self.mask = mask, self.work = work, self.what = what;
  w.waiting |= own;
  if ((w.waiting & mask) != mask) {
    switch_out();
  } else {
    for (u32 left = mask; left; left &= left - 1) {
      const Fiber& other = w.lanes[__builtin_ctz(left)];
      if (other.mask != mask || other.work != work || (other.what != what && std::strcmp(other.what, what)))
        fail("%s with mask %08x, while thread %u is in %s with mask %08x", what, mask, other.thread, other.what,
             other.mask);
    }
    w.waiting &= ~mask;
    if (work) work(w.exchanges, mask);
    block_here->wake(w, mask & ~own);
    maybe_yield();
  }
  if (!work && (mask | w.gone) == ~0u) self.now.warp++;
  return &w.exchanges[self.in_warp];
}

extern "C" void machine_mma(Exchange* lanes, u32) {
  float a[16][16], b[16][8];
  double c[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    const int g = lane / 4, t = lane % 4;
    ::u32 w[6];
    float own[4];
    std::memcpy(w, lanes[lane].in, 24);
    std::memcpy(own, lanes[lane].in + 24, 16);
    for (int i = 0; i < 2; i++) {
      const int shift = 16 * i;
      a[g][2 * t + i] = half_to_float(u16(w[0] >> shift)), a[g + 8][2 * t + i] = half_to_float(u16(w[1] >> shift));
      a[g][2 * t + 8 + i] = half_to_float(u16(w[2] >> shift)),
                       a[g + 8][2 * t + 8 + i] = half_to_float(u16(w[3] >> shift));
      b[2 * t + i][g] = half_to_float(u16(w[4] >> shift)), b[2 * t + 8 + i][g] = half_to_float(u16(w[5] >> shift));
      c[g][2 * t + i] = own[i], c[g + 8][2 * t + i] = own[2 + i];
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) c[row][column] += double(a[row][k] * b[k][column]);  // exact
  for (int lane = 0; lane < WARP; lane++) {
    const int g = lane / 4, t = lane % 4;
    const float own[4] = {float(c[g][2 * t]), float(c[g][2 * t + 1]), float(c[g + 8][2 * t]),
                          float(c[g + 8][2 * t + 1])};
    std::memcpy(lanes[lane].out, own, 16);
  }
}

// ---- barriers of a block

static void release(Block& b, Barrier& barrier) {
  for (int i = 0; i < b.warp_count; i++) {
    b.wake(*b.warps[i], barrier.waiting[i]);
    barrier.waiting[i] = 0;
  }
  barrier.arrived = 0;
}

extern "C" void machine_barrier(int name, int threads) {
  NOTE_PLACE();
  Block& b = *block_here;
  Fiber& self = me();
  if (name < 0 || name >= NAMED) fail("named barrier %d: there are 1 … 15", name);
  if (threads % WARP) fail("named barrier %d of %d threads: no whole warps", name, threads);
  Barrier& barrier = b.barriers[name];
  if (barrier.arrived && barrier.threads != threads)
    fail("named barrier %d of %d threads; others call it with %d", name, threads, barrier.threads);
  barrier.threads = threads;
  if (name) self.team = name;
  if (++barrier.arrived == (threads ? threads : b.live)) {
    release(b, barrier);
    maybe_yield();
  } else {
    barrier.waiting[self.warp->index] |= 1u << self.in_warp;
    wait_in(name ? "a named barrier" : "__syncthreads");
  }
  if (!name)
    self.now.epoch++;
  else
    self.now.named = self.now.named >> 24 == u32(name) ? self.now.named + 1 : u32(name) << 24 | 1;
}

// ---- clusters

extern "C" void machine_cluster_arrive(bool with_memory) {
  NOTE_PLACE();
  Fiber& self = me();
  self.with_memory = with_memory;
  if (self.arrived) fail("arrives at the cluster's barrier a second time without having waited");
  self.arrived = true;
  Cluster& cluster = *block_here->cluster;
  std::lock_guard guard(cluster.lock);
  self.phase = cluster.phase;
  cluster.arrived++;
  cluster.complete_if_all();
}

extern "C" void machine_cluster_wait() {
  NOTE_PLACE();
  Fiber& self = me();
  if (!self.arrived) fail("waits at the cluster's barrier without having arrived");
  Block& b = *block_here;
  bool complete;
  {
    std::lock_guard guard(b.cluster->lock);
    complete = b.cluster->phase != self.phase;
  }
  if (!complete) {
    self.warp->in_cluster_wait |= 1u << self.in_warp;
    wait_in("the cluster's barrier");
  }
  self.arrived = false;
  self.waits++;
  self.now.epoch += self.with_memory;
}

extern "C" u32 machine_cluster_address(u32 here, u32 rank) {
  NOTE_PLACE();
  if (here & PEER) fail("cluster_address of what is such an address already");
  if (int(rank) >= block_here->cluster->size) fail("block %u of a cluster of %d", rank, block_here->cluster->size);
  return PEER | rank << 24 | here;
}

static u8* shared_at(Block& b, u32 address, std::size_t size, std::size_t alignment, const char* what) {
  u8* at = nullptr;
  if (address < STATIC_WINDOW ? address + size <= b.dynamic_size : address - STATIC_WINDOW + size <= b.fixed_size)
    at = address < STATIC_WINDOW ? b.dynamic + address : b.fixed + (address - STATIC_WINDOW);
  if (!at) fail("%s beyond shared memory: %zu bytes at %u of %zu", what, size, address, b.dynamic_size);
  if (std::uintptr_t(at) % alignment) fail("%s at shared address %u: no multiple of %zu", what, address, alignment);
  return at;
}

static u8* peer_at(u32 there, int size, const char* what) {
  Block& b = *block_here;
  if (!(there & PEER)) fail("%s at %u, which is no cluster_address", what, there);
  if (!me().waits) fail("%s before it is known that the cluster's blocks have started", what);
  Block* const peer = b.cluster->blocks[there >> 24 & (MOST_CLUSTER - 1)];
  if (!peer) fail("%s of a block that has not started", what);
  if (peer->finished || peer->cluster != b.cluster)
    fail("%s of block %u of the cluster, which has ended", what, there >> 24 & (MOST_CLUSTER - 1));
  {
    std::lock_guard guard(b.cluster->lock);
    peer->last_peer_access = std::max(peer->last_peer_access, me().waits);
  }
  return shared_at(*peer, there & ((1u << 24) - 1), size, size, what);
}

extern "C" void machine_load_cluster(void* to, u32 there, int size) {
  NOTE_PLACE();
  std::memcpy(to, peer_at(there, size, "load_cluster"), size);
}

extern "C" void machine_store_cluster(u32 there, const void* from, int size) {
  NOTE_PLACE();
  std::memcpy(peer_at(there, size, "store_cluster"), from, size);
}

// ---- dependent launch

extern "C" void machine_waited() { block_here->waited = me().waited = true; }
extern "C" void machine_dependents() {}

// ---- memory

extern "C" u8* machine_dynamic_shared() { return block_here->dynamic; }

extern "C" u32 machine_shared_address(const void* p) {
  NOTE_PLACE();
  Block& b = *block_here;
  const u8* const at = (const u8*)p;
  if (at >= b.dynamic && at <= b.dynamic + b.dynamic_size) return u32(at - b.dynamic);
  if (at >= b.fixed && at <= b.fixed + b.fixed_size) return STATIC_WINDOW + u32(at - b.fixed);
  fail("an address that is not in shared memory, but %td bytes behind dynamic shared memory's %zu", at - b.dynamic,
       b.dynamic_size);
}

// ---- every access of a kernel

static u32 team_of(Block& b, const Access& access) {
  if (access.thread == EVERYWHERE) return 0;
  return b.warps[access.warp()]->lanes[access.thread & SEVERAL ? 0 : access.thread % WARP].team;
}

static void access_shared(Block& b, u32 address, std::size_t size, bool write, bool atomic, bool pending) {
  Fiber& self = me();
  const char* const what = write ? "writes" : "reads";
  const u8* const at = shared_at(b, address, size, 1, what);
  const std::size_t first = address < STATIC_WINDOW ? address : b.static_place() + address - STATIC_WINDOW;
  for (std::size_t begin = first; begin < first + size;) {
    const std::size_t end = std::min(first + size, begin / UNIT * UNIT + UNIT);
    const u8 bytes = u8(((1u << (end - begin)) - 1) << begin % UNIT);
    Unit& unit = b.units[begin / UNIT];
    const u8* const here = at + (begin - first) - begin % UNIT;
    const bool known = unit.write.bytes & bytes && unit.write.when.epoch >= b.first_epoch;
    if (known && unit.on_its_way && !pending)
      fail("%s at shared address %u, where a copy_async of thread %u is under way", what, address, unit.write.thread);
    if (known && unit.agreed & bytes) {
      u16 value, mask = 0;
      std::memcpy(&value, here, UNIT);
      for (int i = 0; i < UNIT; i++) mask |= unit.agreed >> i & 1 ? 0xff << 8 * i : 0;
      if ((value ^ unit.value) & mask)
        fail("%s at shared address %u, where threads, %u among them, wrote different values without a barrier", what,
             address, unit.write.thread);
    }
    if (known && !unit.write.before(self.thread, self.now, team_of(b, unit.write)) && !(atomic && unit.atomic)) {
      if (!write || pending || unit.atomic || atomic)
        fail("%s at shared address %u, without a barrier since thread %u wrote there", what, address,
             unit.write.thread);
      // Fine if it writes the same.
      std::memcpy(&unit.value, here, UNIT);
      unit.agreed = unit.write.bytes & bytes;
    } else if (write) {
      unit.agreed = 0;
    }
    if (write) {
      const Access& read = unit.read;
      if (read.bytes & bytes && read.when.epoch >= b.first_epoch &&
          !read.before(self.thread, self.now, team_of(b, read))) {
        if (read.thread & SEVERAL)
          fail("writes at shared address %u, without a barrier since several threads read there", address);
        fail("writes at shared address %u, without a barrier since thread %u read there", address, read.thread);
      }
      unit.note_write(self.thread, self.now, bytes, atomic, pending);
    } else {
      unit.note_read(self.thread, self.now, bytes, team_of(b, unit.read));
    }
    begin = end;
  }
}

enum How { READ, WRITE, ATOMIC, COPY };

static void access_global(std::uintptr_t at, std::size_t size, std::size_t alignment, How how) {
  const bool write = how == WRITE || how == ATOMIC;
  Region*& last = last_region;
  Block& b = *block_here;
  if (last_version != memory.version || !last || !last->holds(at, size)) {
    last_version = memory.version;
    last = memory.find(at);
    if (last && !last->holds(at, size)) {
      const Region near = {last->begin, last->end, {}};
      last = nullptr;
      fail("%s %zu bytes at %zu of an allocation of %zu", write ? "writes" : "reads", size, at - near.begin,
           near.end - near.begin);
    }
    if (!last) fail("%s %zu bytes at %p, where there is no allocation", write ? "writes" : "reads", size, (void*)at);
  }
  if (at % alignment)
    fail("%s %zu bytes at %p, which is no multiple of %zu", write ? "writes" : "reads", size, (void*)at, alignment);
  const Launch& launch = *b.launch;
  const Request& request = launch.request;
  const Fiber& self = me();
  Writer here{request.number, u32(b.number), self.now.epoch, u16(self.now.warp), u16(self.thread), 3, how == ATOMIC};
  if (size < GRAIN) here.bytes = 1 << at % GRAIN;
  if (request.early && !self.waited && how != READ && how != COPY)
    fail("writes to the device's memory before wait_for_previous");
  Writer* const first = last->writers.data() + (at - last->begin) / GRAIN;
  Writer* const end = last->writers.data() + (at + size + GRAIN - 1 - last->begin) / GRAIN;
  for (Writer* writer = first; writer < end; writer++) {
    const Writer was = *writer;
    const bool same = was.launch == here.launch && was.bytes & here.bytes;
    // Atomics may meet atomics.
    const bool ordered = how == READ || how == WRITE || (how == ATOMIC && !was.atomic);
    if (same && was.block == here.block) {
      if (ordered && !was.before(here))
        fail("%s what thread %u wrote to the device's memory, without a barrier since",
             how == READ ? "reads" : "writes", was.thread);
    } else if (same) {
      // Another block's: it must have said so by an atomic, and this block must have heard. What a copy brings may be
      // in flux if nobody looks at it.
      if (ordered) {
        const Writer &said = launch.atomics[was.block], &heard = launch.atomics[here.block];
        if (said.launch != here.launch || !was.before(said) || heard.launch != here.launch || !heard.before(here))
          fail("%s what thread %u of block %u of the same launch wrote, without an atomic and barriers between them",
               how == READ ? "reads" : "writes", was.thread, was.block);
      }
    } else if (request.early && !self.waited && was.launch >= request.chain && was.launch != here.launch) {
      fail("reads, before wait_for_previous, what the launch %u in front of it writes", here.launch - was.launch);
    }
    if (how == WRITE || how == ATOMIC) *writer = here;
  }
  if (how == ATOMIC) b.launch->atomics[b.number] = here;
}

static void access(const void* p, std::size_t size, std::size_t alignment, bool write, bool atomic = false) {
  Block& b = *block_here;
  const std::uintptr_t at = std::uintptr_t(p);
  if (at - b.stacks < b.stacks_end - b.stacks) return;
  const u8* const byte = (const u8*)p;
  const bool dynamic = std::size_t(byte - b.dynamic) < b.dynamic_size;
  if (dynamic || std::size_t(byte - b.fixed) < b.fixed_size) {
    const u32 address = dynamic ? u32(byte - b.dynamic) : STATIC_WINDOW + u32(byte - b.fixed);
    if (at % alignment)
      fail("%s %zu bytes at shared address %u, no multiple of %zu", write ? "writes" : "reads", size, address,
           alignment);
    access_shared(b, address, size, write, atomic, false);
    return;
  }
  const u8* const warp = (const u8*)me().warp;
  if (byte >= warp && byte < warp + sizeof(Warp)) return;
  if (!write && at >= b.module && at < b.module_end) return;
  if (std::size_t(byte - (b.dynamic - FENCE)) < b.dynamic_size + 2 * FENCE)
    fail("%s %zu bytes at %td of %zu of dynamic shared memory", write ? "writes" : "reads", size, byte - b.dynamic,
         b.dynamic_size);
  access_global(at, size, alignment, atomic ? ATOMIC : write ? WRITE : READ);
}

// What g++ puts in front of every access with -fsanitize=thread.
extern "C" {
void __tsan_init() {}
#define TOUCH(size)                                                                      \
  void __tsan_read##size(void* p) { NOTE_PLACE(), access(p, size, size, false); }        \
  void __tsan_write##size(void* p) { NOTE_PLACE(), access(p, size, size, true); }        \
  void __tsan_unaligned_read##size(void* p) { NOTE_PLACE(), access(p, size, 1, false); } \
  void __tsan_unaligned_write##size(void* p) { NOTE_PLACE(), access(p, size, 1, true); }
TOUCH(1)
TOUCH(2)
TOUCH(4)
TOUCH(8)
TOUCH(16)
#undef TOUCH
void __tsan_read_range(void* p, std::size_t size) { NOTE_PLACE(), access(p, size, 1, false); }
void __tsan_write_range(void* p, std::size_t size) { NOTE_PLACE(), access(p, size, 1, true); }
void machine_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
void machine_atomic(void* p, std::size_t size) { NOTE_PLACE(), access(p, size, size, true, true); }
}

// What g++ calls with -fsanitize=alignment; of `data` see libubsan's TypeMismatchData.
struct Mismatch {
  const char* file;
  u32 line, column;
  const void* type;
  u8 log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(const Mismatch* data, std::uintptr_t at) {
  NOTE_PLACE();
  fail("a pointer to what must lie at multiples of %d is %p: no multiple of %d", 1 << data->log_alignment, (void*)at,
       1 << data->log_alignment);
}

extern "C" const void* machine_check_shared(const void* p, std::size_t size, std::size_t alignment, const char* what) {
  NOTE_PLACE();
  const u32 address = machine_shared_address(p);
  const void* const at = shared_at(*block_here, address, size, alignment, what);
  access_shared(*block_here, address, size, false, false, false);
  return at;
}

extern "C" void machine_check_global(const void* p, std::size_t size, std::size_t alignment) {
  NOTE_PLACE();
  access_global(std::uintptr_t(p), size, alignment, READ);
}

static void copy_now(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

// A copy's 16 bytes were written by who has waited for it, now.
static void arrived(Block& b, u32 address) {
  Fiber& self = me();
  const std::size_t first = address < STATIC_WINDOW ? address : b.static_place() + address - STATIC_WINDOW;
  for (std::size_t i = first / UNIT; i < (first + 16) / UNIT; i++)
    b.units[i].note_write(self.thread, self.now, (1 << UNIT) - 1, false, false);
}

extern "C" void machine_copy_async(u32 shared, const void* global, bool wanted) {
  NOTE_PLACE();
  Block& b = *block_here;
  u8* const to = shared_at(b, shared, 16, 16, "copy_async");
  if (wanted)
    access_global(std::uintptr_t(global), 16, 16, COPY);
  else if (std::uintptr_t(global) % 16)
    fail("copy_async from %p, no multiple of 16", global);
  access_shared(b, shared, 16, true, false, true);
  const Copy copy{to, wanted ? (const u8*)global : nullptr};
  const int copies = b.launch->request.copies;
  if (copies == AT_ONCE || (copies == EITHER && b.draw(2))) copy_now(copy);
  // Also what was copied: its source or target may have changed by the time when it may come at the latest.
  me().copies.push_back(copy);
}

extern "C" void machine_copy_commit() { me().groups.push_back(me().copies.size()); }

extern "C" void machine_copy_wait(int most) {
  Fiber& self = me();
  if (int(self.groups.size()) <= most) return;
  const std::size_t done = self.groups.size() - most, end = self.groups[done - 1];
  Block& b = *block_here;
  for (std::size_t i = 0; i < end; i++) {
    if (b.launch->request.copies != AT_ONCE) copy_now(self.copies[i]);
    arrived(b, machine_shared_address(self.copies[i].to));
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + end);
  self.groups.erase(self.groups.begin(), self.groups.begin() + done);
  for (auto& each : self.groups) each -= end;
}

// ---- blocks

static void lane_body() {
  Block& b = *block_here;
  const Request& request = b.launch->request;
  request.entry->invoke(request.arguments);
  Fiber& self = me();
  Warp& w = *self.warp;
  w.gone |= 1u << self.in_warp;
  for (u32 left = w.waiting; left; left &= left - 1) {
    const Fiber& other = w.lanes[__builtin_ctz(left)];
    if (w.gone & other.mask) fail("leaves while thread %u waits for it in %s", other.thread, other.what);
  }
  b.live--;
  b.cluster_waits = self.waits;
  if (b.cluster->size > 1) {
    std::lock_guard guard(b.cluster->lock);
    (self.arrived && self.phase == b.cluster->phase ? b.cluster->left : b.cluster->gone)++;
    b.cluster->complete_if_all();
  }
  Barrier& all = b.barriers[0];
  if (all.arrived && all.arrived == b.live) release(b, all);
  switch_out();
  __builtin_unreachable();
}

static std::string who_waits(Block& b) {
  std::vector<std::pair<std::string, int>> found;
  std::string first;
  for (int i = 0; i < b.warp_count; i++)
    for (const Fiber& fiber : b.warps[i]->lanes) {
      if (b.warps[i]->gone >> fiber.in_warp & 1 || !fiber.warp) continue;
      auto at = std::find_if(found.begin(), found.end(), [&](auto& each) { return each.first == fiber.what; });
      if (at == found.end()) at = found.insert(found.end(), {fiber.what, 0});
      at->second++;
    }
  std::string text;
  for (auto& [what, count] : found) text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads in " + what;
  return text;
}

static void stuck(Block& b) {
  char place[96];
  std::snprintf(place, sizeof place, "block (%u, %u, %u): nobody can go on: ", b.index.x, b.index.y, b.index.z);
  b.launch->fail(place + who_waits(b));
  b.failed = true;
}

// Until a barrier of the cluster is complete for which somebody waits; whether one will be.
static bool sleep_in_cluster(Block& b) {
  Cluster& cluster = *b.cluster;
  std::unique_lock guard(cluster.lock);
  const auto somebody = [&] {
    bool any = false;
    for (int i = 0; i < b.warp_count; i++) {
      Warp& w = *b.warps[i];
      u32 lanes = 0;
      for (u32 left = w.in_cluster_wait; left; left &= left - 1)
        if (w.lanes[__builtin_ctz(left)].phase != cluster.phase) lanes |= left & -left;
      w.in_cluster_wait &= ~lanes;
      b.wake(w, lanes);
      any |= lanes != 0;
    }
    return any;
  };
  if (somebody()) return true;
  if (!cluster.failed && ++cluster.asleep == cluster.unfinished) {
    cluster.failed = true;
    cluster.changed.notify_all();
  }
  cluster.changed.wait(guard, [&] { return cluster.failed || somebody(); });
  if (b.ready) return true;
  guard.unlock();
  stuck(b);
  return false;
}

// A compiled library: where it lies, and the calling thread's `thread_local` variables of it.
struct Module {
  u8* fixed;
  std::size_t fixed_size;
  std::uintptr_t begin, end;
};

struct Worker {
  Block block{};
  u8* stacks = nullptr;
  std::size_t stack_count = 0;
  std::vector<u8> dynamic;
  std::vector<std::pair<const Entry*, Module>> modules;
  u32 epoch = 0;  // beyond any of blocks before

  u8* stack_top(std::size_t i) {
    // Not all at the same place of a page, which would be the same places in the cache.
    return stacks + (i + 1) * STACK - i * 64 % PAGE - 64;
  }

  void need_stacks(std::size_t count) {
    if (count <= stack_count) return;
    if (stacks) munmap(stacks, stack_count * STACK);
    stacks =
        (u8*)mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (std::size_t i = 0; i < count; i++) mprotect(stacks + i * STACK, PAGE, PROT_NONE);
    stack_count = count;
  }

  const Module& module_of(const Request& request) {
    for (auto& each : modules)
      if (each.first == request.entry) return each.second;
    Module found{nullptr, 0, std::uintptr_t(request.entry), 0};
    request.touch();
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
          Module& found = *(Module*)data;
          const std::uintptr_t inside = found.begin;
          std::uintptr_t begin = ~std::uintptr_t(0), end = 0;
          std::size_t size = 0;
          for (int i = 0; i < info->dlpi_phnum; i++) {
            const auto& part = info->dlpi_phdr[i];
            if (part.p_type == PT_LOAD) {
              begin = std::min(begin, std::uintptr_t(info->dlpi_addr + part.p_vaddr));
              end = std::max(end, std::uintptr_t(info->dlpi_addr + part.p_vaddr + part.p_memsz));
            }
            if (part.p_type == PT_TLS) size = part.p_memsz;
          }
          if (inside < begin || inside >= end) return 0;
          found = {(u8*)info->dlpi_tls_data, size, begin, end};
          return 1;
        },
        &found);
    modules.push_back({request.entry, found});
    return modules.back().second;
  }

  void run(Launch& launch, Cluster& cluster, int rank, int number) {
    const Request& request = launch.request;
    Block& b = block;
    b.launch = &launch, b.cluster = &cluster, b.rank = rank, b.number = number;
    b.index = {u32(number) % request.grid[0], u32(number) / request.grid[0] % request.grid[1],
               u32(number) / request.grid[0] / request.grid[1]};
    b.waited = b.failed = b.finished = false;
    b.cluster_waits = b.last_peer_access = 0;
    b.live = request.threads, b.warp_count = (request.threads + WARP - 1) / WARP, b.current = 0, b.ready = 0;
    b.random = (request.seed + 1) * 0x9e3779b97f4a7c15ull ^ u64(number + 1) * 0xbf58476d1ce4e5b9ull;
    b.favourites = b.draw(~0u);
    std::memset(b.barriers, 0, sizeof b.barriers);
    const Module& module = module_of(request);
    b.fixed = module.fixed, b.fixed_size = module.fixed_size, b.module = module.begin, b.module_end = module.end;
    std::memset(b.fixed, POISON, b.fixed_size);
    // 16 bytes beyond a multiple of 128: no more than is promised.
    dynamic.resize(std::max<std::size_t>(dynamic.size(), request.shared + 2 * FENCE + 256));
    b.dynamic = dynamic.data() + FENCE;
    b.dynamic += (128 - std::uintptr_t(b.dynamic) % 128) + 16;
    b.dynamic_size = request.shared;
    std::memset(b.dynamic - FENCE, POISON, request.shared + 2 * FENCE);
    need_stacks(request.threads);
    b.stacks = std::uintptr_t(stacks), b.stacks_end = b.stacks + stack_count * STACK;
    b.units.resize(std::max(b.units.size(), (b.static_place() + b.fixed_size) / UNIT + 1));
    b.first_epoch = ++epoch;
    while (int(b.warps.size()) < b.warp_count) b.warps.push_back(std::make_unique<Warp>());
    for (int i = 0; i < b.warp_count; i++) {
      Warp& w = *b.warps[i];
      w.waiting = w.gone = w.in_cluster_wait = w.runnable = 0;
      w.index = i;
      for (int lane = 0; lane < WARP; lane++) {
        Fiber& fiber = w.lanes[lane];
        const u32 thread = i * WARP + lane;
        const bool there = thread < request.threads;
        fiber.thread = thread;
        fiber.in_warp = lane;
        fiber.warp = there ? &w : nullptr;
        fiber.what = "its start";
        fiber.arrived = fiber.waited = false;
        fiber.waits = fiber.phase = 0;
        fiber.now = {epoch, 0, 0};
        fiber.team = 0;
        fiber.copies.clear(), fiber.groups.clear();
        if (!there) {
          w.gone |= 1u << lane;
          continue;
        }
        fiber.stack_pointer = new_stack(stack_top(thread), lane_body);
        b.wake(w, 1u << lane);
      }
    }
    block_here = &b;
    {
      std::lock_guard guard(cluster.lock);
      cluster.blocks[rank] = &b;
    }
    for (;;) {
      Fiber* const next = pick(b);
      if (next) {
        fiber_here = next;
        machine_switch(&b.main_stack, next->stack_pointer);
        fiber_here = nullptr;
      }
      if (b.failed || !b.live) break;
      if (b.ready) continue;
      bool in_cluster = false;
      for (int i = 0; i < b.warp_count; i++) in_cluster |= b.warps[i]->in_cluster_wait != 0;
      if (!in_cluster) stuck(b);
      if (b.failed || !sleep_in_cluster(b)) break;
    }
    finish(launch, cluster);
  }

  void finish(Launch& launch, Cluster& cluster) {
    Block& b = block;
    for (int i = 0; i < b.warp_count; i++)
      for (const Fiber& fiber : b.warps[i]->lanes) epoch = std::max(epoch, fiber.now.epoch);
    const auto complain = [&](const std::string& what) {
      launch.fail("block (" + std::to_string(b.index.x) + ", " + std::to_string(b.index.y) + ", " +
                  std::to_string(b.index.z) + ") " + what);
      b.failed = true;
    };
    if (!b.failed && launch.request.early && !b.waited)
      complain("never called wait_for_previous, though the kernel may start before the one in front of it has ended");
    for (const u8* at : {b.dynamic - FENCE, b.dynamic + b.dynamic_size})
      if (!b.failed && std::any_of(at, at + FENCE, [](u8 byte) { return byte != POISON; }))
        complain("wrote " + std::string(at < b.dynamic ? "in front of" : "behind") + " its dynamic shared memory");
    std::lock_guard guard(cluster.lock);
    b.finished = true;
    if (!b.failed && cluster.size > 1 && b.last_peer_access && b.last_peer_access >= b.cluster_waits)
      complain("ended while blocks of its cluster may still use its shared memory");
    cluster.unfinished--;
    if (b.failed || (cluster.unfinished && cluster.asleep == cluster.unfinished)) {
      cluster.failed = true;
      cluster.changed.notify_all();
    }
  }

  // Its share of a launch: whole blocks, or the blocks of one rank in all clusters.
  void work(Launch& launch, int number) {
    const Request& request = launch.request;
    const int size = launch.cluster_size, clusters = int(launch.clusters.size());
    const int* const shape = request.entry->cluster;
    for (int i = size > 1 ? 0 : launch.next++; i < clusters && !launch.failed; i = size > 1 ? i + 1 : launch.next++) {
      const int which = launch.order[i];
      int block = which;
      if (size > 1) {
        const int wide = request.grid[0] / shape[0], high = request.grid[1] / shape[1];
        const int x = which % wide * shape[0] + number % shape[0];
        const int y = which / wide % high * shape[1] + number / shape[0] % shape[1];
        const int z = which / wide / high * shape[2] + number / shape[0] / shape[1];
        block = (z * request.grid[1] + y) * request.grid[0] + x;
      }
      run(launch, *launch.clusters[which], size > 1 ? number : 0, block);
    }
    // Nobody waits for blocks that will not start any more.
    for (int i = 0; launch.failed && i < clusters; i++) {
      std::lock_guard guard(launch.clusters[i]->lock);
      launch.clusters[i]->failed = true;
      launch.clusters[i]->changed.notify_all();
    }
  }
};

// ---- launches

struct Pool {
  struct Hand {
    std::thread thread;
    Worker worker;
    std::function<void(Worker&)> job;
  };
  std::mutex lock;
  std::condition_variable changed;
  std::vector<std::unique_ptr<Hand>> hands;

  void run(int count, const std::function<void(Worker&, int)>& job) {
    std::unique_lock guard(lock);
    int left = count;
    while (int(hands.size()) < count) {
      hands.push_back(std::make_unique<Hand>());
      hands.back()->thread = std::thread([this, hand = hands.back().get()] { serve(*hand); });
      hands.back()->thread.detach();
    }
    for (int i = 0; i < count; i++)
      hands[i]->job = [&, i](Worker& worker) {
        job(worker, i);
        std::lock_guard guard(lock);
        left--;
      };
    changed.notify_all();
    changed.wait(guard, [&] { return !left; });
  }

  void serve(Hand& hand) {
    std::unique_lock guard(lock);
    for (;;) {
      changed.wait(guard, [&] { return bool(hand.job); });
      auto job = std::move(hand.job);
      hand.job = nullptr;
      guard.unlock();
      job(hand.worker);
      guard.lock();
      changed.notify_all();
    }
  }
};

extern "C" int machine_launch(const Request* request) {
  static std::mutex one_at_a_time;
  static Pool& pool = *new Pool;  // its threads end with the process
  std::lock_guard guard(one_at_a_time);
  Launch launch(*request);
  const int* const shape = request->entry->cluster;
  launch.cluster_size = shape[0] * shape[1] * shape[2];
  launch.blocks = request->grid[0] * request->grid[1] * request->grid[2];
  if (int(request->threads) > request->entry->most_threads || !request->threads || request->threads > WARP * MOST_WARPS)
    launch.fail("launched with " + std::to_string(request->threads) + " threads, bound to " +
                std::to_string(request->entry->most_threads));
  for (int i = 0; i < 3; i++)
    if (!request->grid[i] || request->grid[i] % shape[i])
      launch.fail("a grid of " + std::to_string(request->grid[0]) + " × " + std::to_string(request->grid[1]) + " × " +
                  std::to_string(request->grid[2]) + " blocks is none of whole clusters");
  if (launch.cluster_size > MOST_CLUSTER) launch.fail("clusters of more than 16 blocks");
  if (launch.failed) return 1;
  launch.atomics.resize(launch.blocks);
  const int clusters = launch.blocks / launch.cluster_size;
  for (int i = 0; i < clusters; i++) {
    launch.clusters.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *launch.clusters.back();
    cluster.size = cluster.unfinished = launch.cluster_size;
    cluster.threads = launch.cluster_size * request->threads;
    launch.order.push_back(i);
  }
  u64 random = request->seed;
  for (int i = clusters - 1; request->seed && i > 0; i--) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(launch.order[i], launch.order[(random >> 33) % (i + 1)]);
  }
  const int workers = launch.cluster_size > 1 ? launch.cluster_size : std::min(request->workers, clusters);
  pool.run(workers, [&](Worker& worker, int number) { worker.work(launch, number); });
  return launch.failed;
}

extern "C" void machine_add_memory(void* p, std::size_t size) { memory.add(p, size); }
extern "C" void machine_remove_memory(void* p) { memory.remove(p); }

}  // namespace machine
