// The kernels of attention_sm90a.cu: warpgroups that load, unpack and multiply, and what they tell each other.
#pragma once

#include "attention.cuh"
#include "attention_wgmma.cuh"
#include "kv_packed.cuh"
#include "mma.cuh"
#include "ptx.cuh"
#include "tma.cuh"

constexpr int STAGES = 2;
constexpr int MAX_SLOTS = 8;
constexpr int DEALS = 4;  // works that the first warp of a decoding block may be ahead of the others
constexpr int SHARED_LIMIT = 226 * 1024;  // and up to 1 KiB that is not dynamic
// A decode step of one long sequence wants short splits, to spread over the SMs; prefill wants few merges.
constexpr uint32_t SPLIT = 1024;

// Work of one key/value head, with what follows from it.
struct Task {
  Work work;
  uint32_t kv_head;
  uint32_t first_row;
  uint32_t first_tile, end_tile;  // of positions; end_tile is 0 when there is no more work
  uint32_t end;                   // no row sees this position or a later one
};

template <int HD_, int N_, int CONSUMERS_, bool DECODE_, bool PACKED_ = false>
struct Shape {
  static constexpr int HD = HD_, N = N_, CONSUMERS = CONSUMERS_;
  static constexpr bool DECODE = DECODE_, PACKED = PACKED_;
  static constexpr bool DEALT = DECODE && !PACKED;  // whether blocks take works as they come to need them
  static constexpr int ROWS = 64 * CONSUMERS;
  // Warpgroups that make bfloat16 of codes. Two would leave too few registers for outputs of 256 elements.
  static constexpr int UNPACKERS = PACKED ? (HD > 128 ? 1 : 2) : 0;
  static constexpr int THREADS = 128 * (1 + UNPACKERS + CONSUMERS);
  // A row of head_dim elements is cut into parts of 64, the last filled up with zeros.
  static constexpr int PARTS = (HD + 63) / 64;
  static constexpr int Q_PART = 64 * SWIZZLE_ROW, Q_TILE = PARTS * Q_PART;
  // Of a tile of keys or values, 8 rows of a part lie together, then those of the next part.
  static constexpr int GROUP_PART = 8 * SWIZZLE_ROW, GROUP = PARTS * GROUP_PART, KV_TILE = N / 8 * GROUP;
  static constexpr int KEYS_AT = CONSUMERS * Q_TILE;
  static constexpr int VALUES_AT = KEYS_AT + STAGES * KV_TILE;
  static constexpr int TOTALS_AT = VALUES_AT + STAGES * KV_TILE;
  static constexpr int SLOTS_AT = TOTALS_AT + (DECODE ? 0 : ROWS * HD * 4);
  // A slot holds the codes of a tile of keys or values; at most one scale per 16 elements.
  static constexpr int SLOT = N * (HD + HD / 8);
  static constexpr int DEALS_AT = 4 * STAGES + 2 * CONSUMERS, BARRIERS = DEALS_AT + (DEALT ? 2 * DEALS : 0);
  static constexpr int TASKS = CONSUMERS * static_cast<int>(sizeof(Task));
  static constexpr int FIT = (SHARED_LIMIT - SLOTS_AT - 8 * BARRIERS - TASKS) / (SLOT + 16);
  static constexpr int SLOTS = PACKED ? (FIT < MAX_SLOTS ? FIT : MAX_SLOTS) : 0;
  static constexpr int BARRIERS_AT = SLOTS_AT + SLOTS * SLOT;
  static constexpr int TASKS_AT = BARRIERS_AT + 8 * BARRIERS + 16 * SLOTS;
  static constexpr int DEALT_AT = TASKS_AT + TASKS;
  static constexpr int SHARED_BYTES = DEALT_AT + (DEALT ? 4 * DEALS : 0);
  static_assert(SHARED_BYTES <= SHARED_LIMIT);
  static constexpr uint32_t TILES_PER_SPLIT = SPLIT / N;
};

// A position in a ring of stages or, with one stage, in the phases of a barrier.
template <int COUNT>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == COUNT) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// How many works a warp has taken, and where it finds the next.
struct Taken {
  uint32_t count = 0;
  Ring<DEALS> deal;
};

// The two consumers' turns on the tensor cores. The identifiers are literals: see warpgroup_barrier.
__device__ __forceinline__ void wait_for_turn(int consumer) {
  if (consumer == 0) {
    asm volatile("bar.sync 3, 256;" ::: "memory");
  } else {
    asm volatile("bar.sync 4, 256;" ::: "memory");
  }
}

__device__ __forceinline__ void give_turn_to(int consumer) {
  if (consumer == 0) {
    asm volatile("bar.arrive 3, 256;" ::: "memory");
  } else {
    asm volatile("bar.arrive 4, 256;" ::: "memory");
  }
}

template <class S>
struct Attention {
  static constexpr int HD = S::HD, N = S::N;

  const AttentionArgs& args;
  const TensorMap* const cache;  // null for codes, and then there are no boxes
  const uint32_t box_rows;
  const uint32_t shared;
  uint8_t* const shared_pointer;

  __device__ __forceinline__ Attention(const AttentionArgs& args, const TensorMap* cache, uint32_t box_rows,
                                       uint8_t* shared_pointer)
      : args(args),
        cache(cache),
        box_rows(box_rows),
        shared(shared_address(shared_pointer)),
        shared_pointer(shared_pointer) {}

  __device__ __forceinline__ uint32_t keys(int stage) const { return shared + S::KEYS_AT + stage * S::KV_TILE; }
  __device__ __forceinline__ uint32_t values(int stage) const {
    return shared + S::VALUES_AT + stage * S::KV_TILE;
  }
  __device__ __forceinline__ uint32_t queries(int consumer) const { return shared + consumer * S::Q_TILE; }
  __device__ __forceinline__ uint32_t barrier(int index) const { return shared + S::BARRIERS_AT + 8 * index; }
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return barrier(STAGES + stage); }
  __device__ __forceinline__ uint32_t values_full(int stage) const { return barrier(2 * STAGES + stage); }
  __device__ __forceinline__ uint32_t values_empty(int stage) const { return barrier(3 * STAGES + stage); }
  __device__ __forceinline__ uint32_t queries_full(int consumer) const { return barrier(4 * STAGES + consumer); }
  __device__ __forceinline__ uint32_t queries_empty(int consumer) const {
    return barrier(4 * STAGES + S::CONSUMERS + consumer);
  }
  __device__ __forceinline__ uint32_t slot_full(int slot) const { return barrier(S::BARRIERS + slot); }
  __device__ __forceinline__ uint32_t slot_empty(int slot) const { return barrier(S::BARRIERS + S::SLOTS + slot); }

  __device__ __forceinline__ uint32_t deal_full(int deal) const { return barrier(S::DEALS_AT + deal); }
  __device__ __forceinline__ uint32_t deal_empty(int deal) const { return barrier(S::DEALS_AT + DEALS + deal); }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(keys_full(stage), S::PACKED ? 4 * S::UNPACKERS : 1);
      barrier_init(values_full(stage), S::PACKED ? 4 * S::UNPACKERS : 1);
      barrier_init(keys_empty(stage), 4 * S::CONSUMERS);
      barrier_init(values_empty(stage), 4 * S::CONSUMERS);
    }
    for (int consumer = 0; consumer < S::CONSUMERS; consumer++) {
      barrier_init(queries_full(consumer), 32);
      barrier_init(queries_empty(consumer), 128);  // every thread has read the task
    }
    for (int slot = 0; slot < S::SLOTS; slot++) {
      barrier_init(slot_full(slot), 32);
      barrier_init(slot_empty(slot), 4 * S::UNPACKERS);
    }
    for (int deal = 0; S::DEALT && deal < DEALS; deal++) {
      barrier_init(deal_full(deal), 1);
      barrier_init(deal_empty(deal), 1);
    }
    barrier_init_fence();
  }

  // ---- the work

  static constexpr uint32_t NOWHERE = 0xffffffffu;

  // This block's next work, for each warp that loads or unpacks.
  __device__ __forceinline__ Task take(Taken& taken) const {
    Task task = {};
    const uint32_t index = S::DEALT ? next_deal(taken) : next_in_turn(taken);
    if (index == NOWHERE) return task;
    task.kv_head = index % args.shape.kv_heads;
    task.work = args.work[index / args.shape.kv_heads];
    task.first_row = S::DECODE ? 0 : task.work.part * S::ROWS;
    const uint32_t tokens = min(task.work.tokens, divide_up(task.first_row + S::ROWS, args.group));
    task.end = task.work.position + (S::DECODE ? 1 : tokens);
    task.first_tile = first_seen(args, position(task, 0)) / N;
    task.end_tile = divide_up(task.end, N);
    if (S::DECODE) {
      task.first_tile = max(task.first_tile, task.work.part * S::TILES_PER_SPLIT);
      task.end_tile = min(task.end_tile, (task.work.part + 1) * S::TILES_PER_SPLIT);
    }
    return task;
  }

  __device__ __forceinline__ uint32_t next_in_turn(Taken& taken) const {
    const uint2 works = *reinterpret_cast<const uint2*>(args.works);
    uint32_t index;
    const uint32_t count = works.x * args.shape.kv_heads, blocks = min(works.y, gridDim.x);
    return next_work(taken.count++, count, blocks, index) ? index : NOWHERE;
  }

  // Decoding blocks take works when they have room for them: some begin late, beside prompts, and works differ
  // in length. The warp that loads keys and values takes, and tells the one that loads queries. (With codes, where
  // more warps would have to be told, that was slower: 165 instead of 151 us.)
  __device__ __forceinline__ uint32_t next_deal(Taken& taken) const {
    const Ring<DEALS> deal = taken.deal;
    volatile uint32_t* const dealt = reinterpret_cast<uint32_t*>(shared_pointer + S::DEALT_AT) + deal.stage;
    uint32_t index = NOWHERE;
    taken.deal.advance();
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) {
        uint32_t next = blockIdx.x;
        if (taken.count != 0) next = gridDim.x + atomicAdd(args.queue, 1);
        if (next < *args.works * args.shape.kv_heads) index = next;
        // The last block leaves the queue as it was.
        if (index == NOWHERE && atomicInc(args.queue + 1, gridDim.x - 1) == gridDim.x - 1) *args.queue = 0;
        barrier_wait(deal_empty(deal.stage), deal.parity ^ 1);
        *dealt = index;
        barrier_arrive(deal_full(deal.stage));
      }
      taken.count++;
      return __shfl_sync(0xffffffffu, index, 0);
    }
    barrier_wait(deal_full(deal.stage), deal.parity);
    index = *dealt;
    __syncwarp();
    release(deal_empty(deal.stage));
    return index;
  }

  // Position of a row of the tile; of rows behind the last token, what it would be. Sharers of a split see
  // all of it, as if they were at its last position.
  __device__ __forceinline__ uint32_t position(const Task& task, uint32_t row) const {
    return task.work.position + (S::DECODE ? 0 : (task.first_row + row) / args.group);
  }

  __device__ __forceinline__ Task& shared_task(int consumer) const {
    return reinterpret_cast<Task*>(shared_pointer + S::TASKS_AT)[consumer];
  }

  // ---- loading

  __device__ __forceinline__ void load_keys_and_values() const {
    Ring<STAGES> ring;
    Taken taken;
    for (Task task = take(taken); task.end_tile != 0; task = take(taken)) {
      const bool again = !S::DECODE || task.work.tokens > 1;
      uint32_t next = find_block(task, task.first_tile, box_rows);
      for (uint32_t tile = task.first_tile; tile < task.end_tile; tile++) {
        const uint32_t block = next;
        next = find_block(task, tile + 1, box_rows);  // on its way while this tile's copies wait for room
        const int row = cache_row(task, tile, block);
        load_tile(keys(ring.stage), keys_full(ring.stage), keys_empty(ring.stage), ring.parity, row, again);
        const int to_values = args.shape.kv_heads * args.shape.block_size;
        load_tile(values(ring.stage), values_full(ring.stage), values_empty(ring.stage), ring.parity,
                  row == OUTSIDE ? row : row + to_values, again);
        ring.advance();
      }
    }
  }

  // A tile's rows are loaded by a warp, `rows` by each of its first lanes. The block where a lane's are:
  __device__ __forceinline__ uint32_t find_block(const Task& task, uint32_t tile, uint32_t rows) const {
    const uint32_t row = threadIdx.x % 32 * rows, position = tile * N + row;
    if (row >= N || position >= task.end || tile >= task.end_tile) return NOWHERE;
    return args.tables[task.work.table + position / args.shape.block_size];
  }

  static constexpr int OUTSIDE = -256;  // TMA reads zeros there

  // The row of the cache where this lane's box of keys begins.
  __device__ __forceinline__ int cache_row(const Task& task, uint32_t tile, uint32_t block) const {
    if (block == NOWHERE) return OUTSIDE;
    const uint32_t position = tile * N + threadIdx.x % 32 * box_rows, block_size = args.shape.block_size;
    return (((args.layer * args.shape.blocks + block) * 2) * args.shape.kv_heads + task.kv_head) * block_size +
           position % block_size;
  }

  // `again`: whether others will read it soon.
  __device__ __forceinline__ void load_tile(uint32_t to, uint32_t full, uint32_t empty, uint32_t parity, int row,
                                            bool again) const {
    barrier_wait(empty, parity ^ 1);
    if (threadIdx.x % 32 == 0) barrier_arrive_expect(full, S::KV_TILE);
    __syncwarp();
    const uint32_t box = threadIdx.x % 32 * box_rows / 8;
    if (box < N / 8) {
      tma_load_rows(to + box * S::GROUP, *cache, row / 8, full, again ? l2_evict_normal() : l2_evict_first());
    }
  }

  // ---- codes

  // Loads keys (`which` 0) or values (1) into every second slot; one warp each. Copies of 16 bytes: of blocks of
  // few positions, bulk copies are too small to keep memory busy.
  __device__ __forceinline__ void load_codes(int which) const {
    Ring<S::SLOTS> slot;
    if (which == 1) slot.advance();
    Taken taken;
    for (Task task = take(taken); task.end_tile != 0; task = take(taken)) {
      uint32_t next = find_block(task, task.first_tile, 16);
      for (uint32_t tile = task.first_tile; tile < task.end_tile; tile++) {
        const uint32_t block = next;
        next = find_block(task, tile + 1, 16);
        barrier_wait(slot_empty(slot.stage), slot.parity ^ 1);
        load_slot(task, tile, block, which, slot.stage);
        slot.advance();
        slot.advance();
      }
    }
  }

  // Lane i knows the block of rows 16 i to 16 i + 15.
  __device__ __forceinline__ void load_slot(const Task& task, uint32_t tile, uint32_t block, int which,
                                            int slot) const {
    const uint32_t lane = threadIdx.x % 32, block_size = args.shape.block_size;
    const uint32_t scales_row = 2 * args.shape.scales(), first = (tile * N + lane * 16) % block_size;
    const uint32_t to = shared + S::SLOTS_AT + slot * S::SLOT;
    const uint32_t groups = __popc(__ballot_sync(0xffffffffu, block != NOWHERE));
    const size_t mine = args.shape.key_tile(args.layer, block, task.kv_head) + which * args.shape.key_to_value();
#pragma unroll 4
    for (uint32_t group = 0; group < groups; group++) {
      const uint8_t* const codes = args.cache + __shfl_sync(0xffffffffu, mine, group);
      const uint32_t row = __shfl_sync(0xffffffffu, first, group);
#pragma unroll
      for (uint32_t i = lane; i < HD; i += 32) {
        copy_async(to + group * 16 * HD + i * 16, codes + row * HD + i * 16, true);
      }
      const uint8_t* const scales = codes + block_size * HD + row * scales_row;
      if (lane < scales_row) copy_async(to + N * HD + group * 16 * scales_row + lane * 16, scales + lane * 16, true);
    }
    copy_async_arrive(slot_full(slot));
  }

  __device__ __forceinline__ void unpack_tiles() const {
    Ring<STAGES> ring;
    Ring<S::SLOTS> slot;
    Taken taken;
    for (Task task = take(taken); task.end_tile != 0; task = take(taken)) {
      for (uint32_t tile = task.first_tile; tile < task.end_tile; tile++) {
        const uint32_t valid = task.end - tile * N, stage = ring.stage * S::KV_TILE;
        barrier_wait(keys_empty(ring.stage), ring.parity ^ 1);
        unpack_tile(shared_pointer + S::KEYS_AT + stage, keys_full(ring.stage), slot, valid);
        slot.advance();
        barrier_wait(values_empty(ring.stage), ring.parity ^ 1);
        unpack_tile(shared_pointer + S::VALUES_AT + stage, values_full(ring.stage), slot, valid);
        slot.advance();
        ring.advance();
      }
    }
  }

  // Rows from `valid` on become zero: what is there is another sequence's.
  __device__ __forceinline__ void unpack_tile(uint8_t* to, uint32_t full, const Ring<S::SLOTS>& slot,
                                              uint32_t valid) const {
    const uint8_t* const from = shared_pointer + S::SLOTS_AT + slot.stage * S::SLOT;
    const bf16* const scales = reinterpret_cast<const bf16*>(from + N * HD);
    const uint32_t scales_row = args.shape.scales(), scale_step = scales_row > 1 ? 1 : 0;
    // Loads of a batch do not wait for the stores of the one before.
    constexpr uint32_t COUNT = N * (HD / 16) / (128 * S::UNPACKERS);
    constexpr uint32_t BATCH = COUNT % 4 == 0 ? 4 : COUNT % 3 == 0 ? 3 : 2;
    static_assert(COUNT * 128 * S::UNPACKERS == N * (HD / 16) && COUNT % BATCH == 0);
    barrier_wait(slot_full(slot.stage), slot.parity);
#pragma unroll
    for (uint32_t start = 0; start < COUNT; start += BATCH) {
      uint4 codes[BATCH];
      bf16 scale[BATCH];
#pragma unroll
      for (uint32_t i = 0; i < BATCH; i++) {
        uint32_t row, piece;
        find_piece(start + i, row, piece);
        codes[i] = *reinterpret_cast<const uint4*>(from + row * HD + piece * 16);
        scale[i] = row < valid ? scales[row * scales_row + piece * scale_step] : bf16{0};
      }
#pragma unroll
      for (uint32_t i = 0; i < BATCH; i++) {
        uint32_t row, piece;
        find_piece(start + i, row, piece);
        uint4 low, high;
        unpack16(codes[i], scale[i], args.shape.format, low, high);
        uint8_t* const part = to + row / 8 * S::GROUP + piece / 4 * S::GROUP_PART + row % 8 * SWIZZLE_ROW;
        *reinterpret_cast<uint4*>(part + (piece % 4 * 2 ^ row % 8) * 16) = low;
        *reinterpret_cast<uint4*>(part + (piece % 4 * 2 + 1 ^ row % 8) * 16) = high;
      }
    }
    shared_to_async_fence();
    __syncwarp();
    release(full);
    release(slot_empty(slot.stage));
  }

  // Which piece is this thread's i-th.
  static __device__ __forceinline__ void find_piece(uint32_t i, uint32_t& row, uint32_t& piece) {
    constexpr uint32_t THREADS = 128 * S::UNPACKERS;
    const uint32_t thread = threadIdx.x - 128;
    if constexpr (HD % 64 == 0) {
      // The same in every 8th row. Eight neighbours have two rows of a part, whose pieces of bfloat16 lie in
      // different banks.
      constexpr uint32_t STEP = THREADS / (HD / 16);
      static_assert(STEP % 8 == 0);
      row = thread / (8 * S::PARTS) * 2 + thread / 4 % 2 + i * STEP;
      piece = thread / 8 % S::PARTS * 4 + thread % 4;
    } else {
      row = (thread + i * THREADS) / (HD / 16);
      piece = (thread + i * THREADS) % (HD / 16);
    }
  }

  // ---- queries

  // One warp per consumer, which it also tells what the work is.
  __device__ __forceinline__ void load_queries(int consumer) const {
    Ring<1> ring;
    Taken taken;
    bool more = true;
    while (more) {
      const Task task = take(taken);
      more = task.end_tile != 0;
      // A lane finds two rows for all, and has them brought to L2 while the work before is still running.
      uint32_t rows[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        rows[i] = find_query(task, consumer * 64 + i * 32 + threadIdx.x % 32);
        for (uint32_t element = 0; element < HD && rows[i] != NOWHERE; element += 64) {
          prefetch_l2(args.q + rows[i] + element);
        }
      }
      barrier_wait(queries_empty(consumer), ring.parity ^ 1);
      ring.advance();
      if (threadIdx.x % 32 == 0) shared_task(consumer) = task;
      if (more) copy_queries(rows, consumer);
      shared_to_async_fence();
      barrier_arrive(queries_full(consumer));
    }
  }

  // First element of a row's query.
  __device__ __forceinline__ uint32_t find_query(const Task& task, uint32_t row) const {
    const uint32_t r = task.first_row + row, token = r / args.group;
    const uint32_t head = task.kv_head * args.group + r % args.group;
    if (token >= task.work.tokens) return NOWHERE;
    const uint32_t at = task.work.token + token;
    return (S::DECODE ? args.sharers[at].token : at) * args.q_stride + head * HD;
  }

  // Rows without a token become zero.
  __device__ __forceinline__ void copy_queries(const uint32_t (&rows)[2], int consumer) const {
    constexpr uint32_t PIECES = HD / VEC;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll 8
      for (uint32_t i = threadIdx.x % 32; i < 32 * PIECES; i += 32) {
        const uint32_t row = half * 32 + i / PIECES, piece = i % PIECES;
        const uint32_t from = __shfl_sync(0xffffffffu, rows[half], i / PIECES);
        const uint32_t to = piece / 8 * S::Q_PART + row * SWIZZLE_ROW + (piece % 8 ^ row % 8) * 16;
        copy_async(queries(consumer) + to, args.q + (from == NOWHERE ? 0 : from + piece * VEC), from != NOWHERE);
      }
    }
    copy_async_commit();
    copy_async_wait<0>();
  }

  // ---- multiplying

  // What a thread has of two rows, 8 apart.
  struct Rows {
    float scores[N / 2];
    uint32_t weights[N / 4];  // the scores' weights, as the A operand
    float out[HD / 2];
    uint32_t position[2];
    // How many of them are wanted: where a split's queries have fewer than 64 heads, other warps' are not.
    int wanted;
    Sharer sharer[2];  // of a split
    // Tiles of which all rows of the warpgroup see every position.
    uint32_t whole_from, whole_to;
  };

  static __device__ __forceinline__ uint32_t thread_row() {
    return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ void find_rows(Rows& rows, const Task& task, int consumer) const {
    const uint32_t top = consumer * 64;
    rows.position[0] = position(task, top + thread_row());
    rows.position[1] = position(task, top + thread_row() + 8);
    rows.wanted = 2;
    if (S::DECODE) {
      const uint32_t first = threadIdx.x % 128 / 32 * 16, count = task.work.tokens * args.group;
      rows.wanted = count <= first ? 0 : count <= first + 8 ? 1 : 2;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t row = thread_row() + half * 8;
        if (row < count) rows.sharer[half] = args.sharers[task.work.token + row / args.group];
      }
    }
    rows.whole_from = divide_up(first_seen(args, position(task, top + 63)), N);
    rows.whole_to = (position(task, top) + 1) / N;
  }

  __device__ __forceinline__ void multiply_keys(Rows& rows, int consumer, int stage) const {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HD / WGMMA_K; k++) {
      const uint64_t q = wgmma_tile(queries(consumer) + k / 4 * S::Q_PART) + k % 4 * WGMMA_NEXT_K;
      const uint64_t key = keys_tile(keys(stage) + k / 4 * S::GROUP_PART, S::GROUP) + k % 4 * WGMMA_NEXT_K;
      Wgmma<N>::run(rows.scores, q, key, k != 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(Rows& rows, int stage, bool accumulate) const {
    wgmma_fence();
    const uint64_t value = values_tile(values(stage), S::GROUP_PART, S::GROUP);
#pragma unroll
    for (int k = 0; k < N / WGMMA_K; k++) {
      WgmmaValues<HD>::run(rows.out, rows.weights + 4 * k, value + k * (2 * S::GROUP / 16), accumulate || k != 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void weigh(Rows& rows, Weights& weights, uint32_t tile, float (&change)[2]) const {
    change[0] = change[1] = 1.f;
    if (S::DECODE && rows.wanted == 0) return;
    if (args.cap_out != 0.f) cap_scores(rows.scores, args);
    if (tile < rows.whole_from || tile >= rows.whole_to) {
      hide_unseen(rows.scores, args, tile * N, rows.position, threadIdx.x % 4 * 2);
    }
    weights.add(rows.scores, args.scale, change, rows.wanted);
  }

  static __device__ __forceinline__ void pack_weights(Rows& rows) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) rows.weights[i] = pack_bf16(rows.scores[2 * i], rows.scores[2 * i + 1]);
  }

  // Says that this warp is done.
  static __device__ __forceinline__ void release(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }

  // Values behind the end are another sequence's: even a weight of 0 would not silence a NaN. Whole boxes
  // there are zero already; all consumers together clear the rest of the last one. (Unpacked rows there are zero.)
  __device__ __forceinline__ void clear_values(const Task& task, int stage) const {
    if (S::PACKED) return;
    const uint32_t rows = task.end - (task.end_tile - 1) * N;
    if (rows >= N || rows % box_rows == 0) return;
    const uint32_t count = (box_rows - rows % box_rows) * S::PARTS * 8;
    for (uint32_t i = threadIdx.x - 128; i < count; i += 128 * S::CONSUMERS) {
      const uint32_t row = rows + i / (S::PARTS * 8), piece = i % (S::PARTS * 8);
      uint8_t* const to = shared_pointer + S::VALUES_AT + stage * S::KV_TILE + row / 8 * S::GROUP +
                          piece / 8 * S::GROUP_PART + row % 8 * SWIZZLE_ROW + piece % 8 * 16;
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
    shared_to_async_fence();
    asm volatile("bar.sync 5, %0;" ::"n"(128 * S::CONSUMERS) : "memory");
  }

  __device__ __forceinline__ void consume(int consumer) const {
    Ring<STAGES> ring;
    Ring<1> query_ring;
    if (S::CONSUMERS == 2 && consumer == 1) give_turn_to(0);
    while (true) {
      barrier_wait(queries_full(consumer), query_ring.parity);
      query_ring.advance();
      const Task task = shared_task(consumer);
      if (task.end_tile == 0) return;
      attend(task, consumer, ring);
    }
  }

  // Scores of a tile are computed while the values of the tile before are still being multiplied.
  __device__ __forceinline__ void attend(const Task& task, int consumer, Ring<STAGES>& ring) const {
    Rows rows;
    Weights weights;
    float2 total[2];
    float change[2];
    bool merging = false;  // earlier splits are in `total`
    bool first = true;     // of the split's tiles, for `out`

    find_rows(rows, task, consumer);
    barrier_wait(keys_full(ring.stage), ring.parity);
    multiply_keys(rows, consumer, ring.stage);
    wgmma_wait<0>();
    wgmma_keep(rows.scores);
    release(keys_empty(ring.stage));
    if (task.first_tile + 1 == task.end_tile) barrier_arrive(queries_empty(consumer));
    weigh(rows, weights, task.first_tile, change);
    pack_weights(rows);
    Ring<STAGES> before = ring;
    ring.advance();

    for (uint32_t tile = task.first_tile + 1; tile < task.end_tile; tile++) {
      barrier_wait(keys_full(ring.stage), ring.parity);
      if (S::CONSUMERS == 2) wait_for_turn(consumer);
      multiply_keys(rows, consumer, ring.stage);
      barrier_wait(values_full(before.stage), before.parity);
      multiply_values(rows, before.stage, !first);
      if (S::CONSUMERS == 2) give_turn_to(1 - consumer);
      wgmma_wait<1>();
      wgmma_keep(rows.scores);
      release(keys_empty(ring.stage));
      if (tile + 1 == task.end_tile) barrier_arrive(queries_empty(consumer));
      const bool anew = !S::DECODE && tile % S::TILES_PER_SPLIT == 0;
      const Weights so_far = weights;
      if (anew) weights = Weights();
      weigh(rows, weights, tile, change);
      wgmma_wait<0>();
      wgmma_keep(rows.out);
      release(values_empty(before.stage));
      if (anew) {
        add_split(rows, so_far, total, consumer, merging);
        merging = true;
      } else {
#pragma unroll
        for (int i = 0; i < HD / 2; i++) rows.out[i] *= change[i / 2 % 2];
      }
      first = anew;
      pack_weights(rows);
      before = ring;
      ring.advance();
    }
    barrier_wait(values_full(before.stage), before.parity);
    clear_values(task, before.stage);
    multiply_values(rows, before.stage, !first);
    wgmma_wait<0>();
    wgmma_keep(rows.out);
    release(values_empty(before.stage));
    if (S::DECODE) {
      hand_on(task, rows, weights, consumer);
    } else {
      finish(task, rows, weights, total, consumer, merging);
    }
  }

  // ---- splits

  __device__ __forceinline__ float4* totals(int consumer) const {
    return reinterpret_cast<float4*>(shared_pointer + S::TOTALS_AT + consumer * 64 * HD * 4) + threadIdx.x % 128;
  }

  // Adds a split's outcome to those before it, which lie in shared memory.
  __device__ __forceinline__ void add_split(Rows& rows, const Weights& weights, float2 (&total)[2], int consumer,
                                            bool merging) const {
    float before[2], after[2];
    merge_sums(weights, total, merging, before, after);
    float4* const to = totals(consumer);
#pragma unroll
    for (int i = 0; i < HD / 8; i++) {
      float4 x = make_float4(rows.out[4 * i], rows.out[4 * i + 1], rows.out[4 * i + 2], rows.out[4 * i + 3]);
      if (merging) {
        const float4 t = to[i * 128];
        x = make_float4(merged(t.x, x.x, before[0], after[0]), merged(t.y, x.y, before[0], after[0]),
                        merged(t.z, x.z, before[1], after[1]), merged(t.w, x.w, before[1], after[1]));
      }
      to[i * 128] = x;
    }
  }

  // As merging into nothing would do: that leaves a part as it is.
  __device__ __forceinline__ void merge_sums(const Weights& weights, float2 (&total)[2], bool merging,
                                             float (&before)[2], float (&after)[2]) const {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const float2 part = weights.row(row, args.scale);
      if (merging) {
        merge(total[row], part, before[row], after[row]);
      } else {
        total[row] = part;
      }
    }
  }

  __device__ __forceinline__ void finish(const Task& task, Rows& rows, const Weights& weights, float2 (&total)[2], int consumer,
                                         bool merging) const {
    float before[2], after[2];
    merge_sums(weights, total, merging, before, after);
    if (merging) {
      const float4* from = totals(consumer);
#pragma unroll
      for (int i = 0; i < HD / 8; i++) {
        const float4 t = from[i * 128];
        rows.out[4 * i] = merged(t.x, rows.out[4 * i], before[0], after[0]);
        rows.out[4 * i + 1] = merged(t.y, rows.out[4 * i + 1], before[0], after[0]);
        rows.out[4 * i + 2] = merged(t.z, rows.out[4 * i + 2], before[1], after[1]);
        rows.out[4 * i + 3] = merged(t.w, rows.out[4 * i + 3], before[1], after[1]);
      }
    }
    store_rows(task, rows, total, consumer);
  }

  // Writes a warp's 16 rows by way of the part of shared memory that held its threads' totals: 512 bytes in
  // every 2048. There rows lie one after another, their pieces permuted against bank conflicts.
  __device__ __forceinline__ void store_rows(const Task& task, const Rows& rows, const float2 (&total)[2],
                                             int consumer) const {
    constexpr uint32_t PIECES = HD / VEC, PER_CHUNK = 512 / (2 * HD);
    const uint32_t warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    uint8_t* const chunks = shared_pointer + S::TOTALS_AT + consumer * 64 * HD * 4 + warp * 512;
    const auto place = [&](uint32_t row, uint32_t piece) {
      return chunks + row / PER_CHUNK * 2048 + row % PER_CHUNK * (2 * HD) + (piece ^ (row & (HD % 64 ? 3 : 7))) * 16;
    };
    __syncwarp();  // totals have been read
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float inverse = 1.f / total[half].y;
#pragma unroll
      for (int j = 0; j < HD / 8; j++) {
        *reinterpret_cast<uint32_t*>(place(lane / 4 + half * 8, j) + lane % 4 * 4) =
            pack_bf16(rows.out[4 * j + 2 * half] * inverse, rows.out[4 * j + 2 * half + 1] * inverse);
      }
    }
    __syncwarp();
    // A lane finds the place of one row for all.
    const uint32_t r = task.first_row + consumer * 64 + warp * 16 + lane % 16, token = r / args.group;
    const uint32_t head = task.kv_head * args.group + r % args.group;
    const uint32_t heads = args.shape.kv_heads * args.group;
    const uint32_t mine =
        token < task.work.tokens ? ((task.work.token + token) * heads + head) * HD : NOWHERE;
#pragma unroll
    for (uint32_t i = lane; i < 16 * PIECES; i += 32) {
      const uint32_t row = i / PIECES, piece = i % PIECES, to = __shfl_sync(0xffffffffu, mine, row);
      if (to != NOWHERE) {
        *reinterpret_cast<uint4*>(args.out + to + piece * VEC) = *reinterpret_cast<const uint4*>(place(row, piece));
      }
    }
    __syncwarp();  // before the next work's totals
  }

  // Of one of a thread's two rows, what it has of a head's output.
  __device__ __forceinline__ void store(const Rows& rows, int half, float sum, bf16* to) const {
    const float inverse = 1.f / sum;
#pragma unroll
    for (int j = 0; j < HD / 8; j++) {
      *reinterpret_cast<uint32_t*>(to + j * 8 + threadIdx.x % 4 * 2) =
          pack_bf16(rows.out[4 * j + 2 * half] * inverse, rows.out[4 * j + 2 * half + 1] * inverse);
    }
  }

  __device__ __forceinline__ void store_part(const Rows& rows, int half, float2 total, size_t to) const {
#pragma unroll
    for (int j = 0; j < HD / 8; j++) {
      *reinterpret_cast<float2*>(args.partial_out + to * HD + j * 8 + threadIdx.x % 4 * 2) =
          make_float2(rows.out[4 * j + 2 * half], rows.out[4 * j + 2 * half + 1]);
    }
    if (threadIdx.x % 4 == 0) args.partial_sum[to] = total;
  }

  __device__ __forceinline__ uint32_t first_part(uint32_t position) const {
    return first_seen(args, position) / SPLIT;
  }

  // Splits that the query at a position sees.
  __device__ __forceinline__ uint32_t parts(uint32_t position) const {
    return position / SPLIT + 1 - first_part(position);
  }

  // Where a sequence's first split leaves its partial result.
  __device__ __forceinline__ size_t first_slot(const Task& task, const Sharer& sharer) const {
    return size_t(sharer.slot) * args.shape.kv_heads + task.kv_head;
  }

  __device__ __forceinline__ bf16* output(const Task& task, const Sharer& sharer) const {
    return args.out + (size_t(sharer.token) * args.shape.kv_heads + task.kv_head) * args.group * HD;
  }

  // The end of a split: its outcome is a sequence's output if that sees no other; else the last one merges.
  __device__ __forceinline__ void hand_on(const Task& task, const Rows& rows, const Weights& weights,
                                          int consumer) const {
    const float2 total[2] = {weights.row(0, args.scale), weights.row(1, args.scale)};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t row = thread_row() + half * 8, head = row % args.group;
      if (row >= task.work.tokens * args.group) continue;
      const Sharer& sharer = rows.sharer[half];
      if (parts(sharer.position) == 1) {
        store(rows, half, total[half].y, output(task, sharer) + head * HD);
      } else {
        const uint32_t part = task.work.part - first_part(sharer.position);
        const size_t slot = first_slot(task, sharer) + size_t(part) * args.shape.kv_heads;
        store_part(rows, half, total[half], slot * args.group + head);
      }
    }
    if (task.work.tokens > 1 || parts(task.work.position) > 1) merge_ended(task, consumer);
  }

  // Merges the splits of those sequences of which this was the last to end.
  __device__ __forceinline__ void merge_ended(const Task& task, int consumer) const {
    __shared__ uint32_t ended[2];  // a bit for each sharer
    const uint32_t thread = threadIdx.x % 128;
    __threadfence();
    warpgroup_barrier(consumer);
    if (thread < 64) {
      bool last = false;
      if (thread < task.work.tokens) {
        const Sharer sharer = args.sharers[task.work.token + thread];
        const uint32_t count = parts(sharer.position);
        uint32_t* const counter = args.counters + first_slot(task, sharer);
        last = count > 1 && atomicAdd(counter, 1) == count - 1;
        if (last) *counter = 0;
      }
      const uint32_t bits = __ballot_sync(0xffffffffu, last);
      if (thread % 32 == 0) ended[thread / 32] = bits;
    }
    warpgroup_barrier(consumer);
    if ((ended[0] | ended[1]) == 0) return;
    __threadfence();
    for (uint32_t i = 0; i < task.work.tokens; i++) {
      if ((ended[i / 32] >> i % 32 & 1) == 0) continue;
      const Sharer sharer = args.sharers[task.work.token + i];
      merge_parts<HD>(args, first_slot(task, sharer), args.shape.kv_heads, parts(sharer.position), 0, args.group,
                      output(task, sharer), thread, 128);
    }
  }
};

template <class S>
__device__ __forceinline__ void attention(const AttentionArgs& args, const TensorMap* cache, uint32_t box_rows) {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Attention<S> attention(args, cache, box_rows, dynamic_shared);
  if (threadIdx.x == 0) {
    if (!S::PACKED) tma_prefetch(*cache);
    attention.init_barriers();
  }
  if (S::DECODE) let_next_start();
  __syncthreads();
  if (!S::DECODE || !args.beside) wait_for_previous();
  // Not sooner: decoding may be next, which then runs beside this and needs what this has waited for.
  if (!S::DECODE) let_next_start();
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;
  if (warpgroup == 0) {
    if (S::PACKED) {
      registers_decrease<56>();
    } else if (S::CONSUMERS == 2) {
      registers_decrease<40>();
    }
    if (warp >= 1 && warp <= S::CONSUMERS) {
      attention.load_queries(warp - 1);
    } else if constexpr (S::PACKED) {
      if (warp == 0 || warp == 2) attention.load_codes(warp / 2);
    } else if (warp == 0) {
      attention.load_keys_and_values();
    }
  } else if (warpgroup <= S::UNPACKERS) {
    registers_decrease<96>();
    if constexpr (S::PACKED) attention.unpack_tiles();
  } else {
    if (S::CONSUMERS == 2 || S::PACKED) registers_increase<232>();
    attention.consume(warpgroup - 1 - S::UNPACKERS);
  }
  // So that who waits for this kernel waits for both.
  if (S::DECODE && args.beside) wait_for_previous();
}
