// Thin wrappers of the PTX instructions that the Hopper kernels use. Shared-memory addresses are 32-bit.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fastmoe_cpp::cuda::sm90::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// True in one lane of a whole warp. Unlike a comparison of lanes it tells the compiler that there is just one, so that
// what takes uniform registers (TMA) needs no loop over lanes.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// mbarrier

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// On the barrier at the same place in another block of the cluster.
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef FASTMOE_SM90_WATCHDOG
  if (barrier_try_wait(barrier, parity)) return;
  const long long start = clock64();
  while (!barrier_try_wait(barrier, parity)) {
    if (clock64() - start > 1'000'000'000ll) __trap();
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

// Named barrier over `threads` threads; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Copies into shared memory

// Box of a 4-D tensor map at (column, row, half, expert); elements outside the tensor arrive as zeros.
__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int column,
                                         int row, int half, int expert) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(half), "r"(expert)
      : "memory");
}

// The same, into the same place of every block of the cluster in `ranks`, a bit each; each one's barrier counts its bytes.
__device__ __forceinline__ void tma_load_to_all(uint32_t destination, const CUtensorMap* map, uint32_t barrier,
                                                int column, int row, int half, int expert, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(half), "r"(expert), "h"(ranks)
      : "memory");
}

__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// 16 bytes; zeros where `valid` is false (the source is then not read).
__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

// The same where `valid`, of what nobody reads again: the first to leave the L2 cache. `policy` from evict_first().
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_async_once_16(uint32_t destination, const void* source, bool valid,
                                                   uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(destination),
               "l"(source), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// One arrival (of those the barrier was made for) once all copies of this thread so far have been written.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// By hand where no barrier waits for them: closes a group of this thread's copies; waits for all but the last kGroups.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Orders ordinary and cp.async shared-memory writes that this thread made, or knows of through a barrier, before its
// later reads and writes by wgmma and TMA.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ int load_shared(uint32_t address) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void load_shared_16(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

// Four 8 x 8 matrices of 2-byte elements, of which a lane holds in word i columns 2 (lane % 4) and the next of row
// lane / 4: lane 8 i + r gives the address of 16 bytes for row r of matrix i, or kTransposes for its column r.
template <bool kTransposes>
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&v)[4]) {
  if constexpr (kTransposes) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  }
}

// Clusters

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Writes a word to the same place of a block of the cluster, whose barrier counts its four bytes.
__device__ __forceinline__ void send_word(uint32_t address, int value, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there, remote;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [remote];\n}" ::"r"(address),
      "r"(value), "r"(barrier), "r"(rank)
      : "memory");
}

// By every thread of every block of the cluster that has not returned.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Programmatic dependent launch: wait for the results of the kernel before; let the kernel after start its prologue.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Registers

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// wgmma

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of an accumulator across the asynchronous instructions.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Matrix descriptor of a tile in 128-byte swizzled layout whose address is a multiple of 1024.
// K-major: rows of 64 elements of K; 1024 bytes between groups of 8 rows.
// MN-major: blocks of 64 elements of M or N, a row of 128 bytes for each k; 1024 bytes between groups of 8 k,
// `block_bytes` between blocks.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t block_bytes) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(block_bytes >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

#define FASTMOE_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTMOE_F16(d, i) FASTMOE_F4(d, i), FASTMOE_F4(d, i + 4), FASTMOE_F4(d, i + 8), FASTMOE_F4(d, i + 12)
#define FASTMOE_F32(d, i) FASTMOE_F16(d, i), FASTMOE_F16(d, i + 16)
#define FASTMOE_R0                                                                                                     \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define FASTMOE_R32                                                                                                  \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"
#define FASTMOE_R64                                                                                                  \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95"
#define FASTMOE_R96                                                                                                 \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118," \
  "%119,%120,%121,%122,%123,%124,%125,%126,%127"

// One instruction; A_ B_ P_ X_ Y_ are the numbers of the operands after the accumulators.
#define FASTMOE_WGMMA_ONE(TYPE, N_, REGISTERS, A_, B_, P_, X_, Y_, ...)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P_                                                             \
               ", 0;\n"                                                                                             \
               "wgmma.mma_async.sync.aligned.m64n" #N_ "k16.f32." TYPE "." TYPE " {" REGISTERS "}, %" #A_ ", %" #B_ \
               ", p, 1, 1, %" #X_ ", %" #Y_ ";\n}"                                                                  \
               : __VA_ARGS__                                                                                        \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

#define FASTMOE_WGMMA(N_, REGISTERS, A_, B_, P_, X_, Y_, ...)                  \
  if constexpr (std::is_same_v<T, __half>) {                                   \
    FASTMOE_WGMMA_ONE("f16", N_, REGISTERS, A_, B_, P_, X_, Y_, __VA_ARGS__);  \
  } else {                                                                     \
    FASTMOE_WGMMA_ONE("bf16", N_, REGISTERS, A_, B_, P_, X_, Y_, __VA_ARGS__); \
  }

// d [64, kN] (+)= A [64, 16] @ B [16, kN], both in shared memory; transpose 0: K-major, 1: MN-major.
template <typename T, int kN, int kTransposeA, int kTransposeB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 192 || kN == 256);
  if constexpr (kN == 64) {
    FASTMOE_WGMMA(64, FASTMOE_R0, 32, 33, 34, 35, 36, FASTMOE_F32(d, 0));
  } else if constexpr (kN == 128) {
    FASTMOE_WGMMA(128, FASTMOE_R0 "," FASTMOE_R32, 64, 65, 66, 67, 68, FASTMOE_F32(d, 0), FASTMOE_F32(d, 32));
  } else if constexpr (kN == 192) {
    FASTMOE_WGMMA(192, FASTMOE_R0 "," FASTMOE_R32 "," FASTMOE_R64, 96, 97, 98, 99, 100, FASTMOE_F32(d, 0),
                  FASTMOE_F32(d, 32), FASTMOE_F32(d, 64));
  } else {
    FASTMOE_WGMMA(256, FASTMOE_R0 "," FASTMOE_R32 "," FASTMOE_R64 "," FASTMOE_R96, 128, 129, 130, 131, 132,
                  FASTMOE_F32(d, 0), FASTMOE_F32(d, 32), FASTMOE_F32(d, 64), FASTMOE_F32(d, 96));
  }
}

#undef FASTMOE_WGMMA
#undef FASTMOE_WGMMA_ONE
#undef FASTMOE_F4
#undef FASTMOE_F16
#undef FASTMOE_F32
#undef FASTMOE_R0
#undef FASTMOE_R32
#undef FASTMOE_R64
#undef FASTMOE_R96

}  // namespace fastmoe_cpp::cuda::sm90::ptx
