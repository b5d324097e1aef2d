// Where things lie in mxfp8_grouped_mm's kernel for compute capability 9.0, and which tile comes when: integer functions only, so
// that a plain C++ program on any machine can check them (tests/kernels/test_mxfp8_grouped_mm_hopper.py does).
//
//   stage     128 elements of K: weights [W][128] e4m3 and tokens [2][N][64] bf16, both as rows of 128 bytes in which 16-byte
//             pieces are exchanged by row (the copy engine's 128-byte swizzle); or 64, where 256 tokens leave no room for three
//             such stages: weights [W][64], as rows of 64 bytes with the 64-byte swizzle, and tokens [N][64] as before
//   step      16 elements of K: one wgmma. Its A operand, the weights, comes from registers
//   fragment  what a thread has of a step: two rows (i = 0, 1) by two halves of K (high = 0, 1) by two neighbours
#pragma once

#include <cstdint>

namespace inductor_ext {
namespace grouped {

constexpr int kStageK = 128;  // elements of K in a stage
constexpr int kStep = 16;     // elements of K that a wgmma multiplies
constexpr int kBlock = 32;    // elements that share a scale
constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kGroupRows = 64;      // of weights that it multiplies at once: wgmma's M

constexpr int ceil_of(int a, int b) { return (a + b - 1) / b; }

// ---- a stage ----------------------------------------------------------------------------------------------------------------

// Byte `byte` of row `row` in a tile of 128-byte rows that begins at a multiple of 1 024 bytes.
constexpr int swizzled(int row, int byte) { return row * 128 + (byte ^ ((row % 8) << 4)); }
// The same for rows of `width` bytes, 128 or 64, of which two then have 128.
constexpr int swizzled(int row, int byte, int width) {
  return width == 128 ? swizzled(row, byte) : row * 64 + (byte ^ ((row / 2 % 4) << 4));
}

// wgmma's A fragment, by thread of the warpgroup: the row, and the first of two elements of K in the stage.
constexpr int fragment_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + 8 * i; }
constexpr int fragment_k(int thread, int step, int high) { return 16 * step + 8 * high + thread % 4 * 2; }

// Where a thread's two weights lie in a stage of `width` elements, from where those of step 0 do (`weights_of`): both rows of a
// thread have the same row % 8.
constexpr int weights_of(int thread, int width) { return swizzled(fragment_row(thread, 0), fragment_k(thread, 0, 0), width); }
constexpr int weights_at(int first, int step, int i, int high, int width) { return (first ^ (step << 4)) + 8 * width * i + 8 * high; }

// Tokens: 8 elements of K, `piece` 0 to 15 of a token's 16; and where the B operand of a step begins.
constexpr int token_piece(int tokens, int token, int piece) { return piece / 8 * tokens * 128 + swizzled(token, piece % 8 * 16); }
constexpr int token_step(int tokens, int step) { return step / 4 * tokens * 128 + step % 4 * 32; }

// wgmma's D fragment: element [4 * j + 2 * i + e] is row `fragment_row(thread, i)`, and this column.
constexpr int fragment_column(int thread, int j, int e) { return 8 * j + thread % 4 * 2 + e; }

// ---- scales -----------------------------------------------------------------------------------------------------------------

// 2^(byte - 127) as two equal bf16: any e8m0 is one. 0 is 2^-127, a subnormal; 255 is NaN; both have bit 6 besides byte << 7.
constexpr uint32_t factor_of(uint32_t byte) { return byte * 0x00800080u | (byte == 0 || byte == 255 ? 0x00400040u : 0u); }

// The same for byte `b` of a word of four scales in two instructions, a permutation of bytes and a shift: (byte << 8 | edge) >> 1,
// where `edges_of(word)` has 0x80 in the bytes that are 0 or 255 in the word.
constexpr uint32_t edges_of(uint32_t word) {
  const uint32_t some = ((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word, not_all = ((~word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | ~word;
  return ~(some & not_all) & 0x80808080u;
}
constexpr uint32_t permuted(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, selector);
#else
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = selector >> 4 * i & 7;
    result |= ((from < 4 ? low >> 8 * from : high >> 8 * (from - 4)) & 0xff) << 8 * i;
  }
  return result;
#endif
}
constexpr uint32_t factor_in(uint32_t word, uint32_t edges, int b) { return permuted(word, edges, 0x0404u + b * 0x1111u) >> 1; }

// A row's four scales of a stage come in two aligned words, in the first of which they begin: anywhere, where K is not a multiple
// of 128. `scale_shift` is how many bits they begin after its start, row `row` of `rows` of expert `expert`.
constexpr int kScaleSlot = 8;  // bytes a row and a stage
constexpr int scale_shift(uint64_t base, int expert, int rows, int row, int per_row) {
  return static_cast<int>((base + (static_cast<uint64_t>(expert) * rows + row) * per_row) % 4 * 8);
}
constexpr uint32_t scales_in(uint32_t low, uint32_t high, int shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#endif
}
// Where a stage has two scales of a row, those of every other one begin two bytes on.
constexpr int scale_shift_of_stage(int shift, int stage, int scales) { return scales == 4 ? shift : shift ^ (stage % 2 << 4); }
// Ones for those of a stage's `scales` that are there: K may end inside it, and after a row's last one come those of the next row.
constexpr uint32_t scales_there(int per_row, int stage, int scales) {
  const int left = per_row - scales * stage, there = left < scales ? left : scales;
  return there >= 4 ? ~0u : (1u << 8 * there) - 1;
}

// ---- the output's way through shared memory ---------------------------------------------------------------------------------

// 64 channels of the output, [tokens][64], with 16 bytes between tokens: 8 rows of 16 bytes then meet no bank twice.
constexpr int staged_pitch(int size) { return kGroupRows * size + 16; }
constexpr int staged_at(int size, int token, int channel) { return token * staged_pitch(size) + channel * size; }
// stmatrix, transposed: the address that lane 8 * i + t gives is that of token t and of the channels that begin here.
constexpr int staged_row(int thread, int j) {
  return staged_at(2, 8 * j + thread % 8, thread / 32 * 16 + thread % 32 / 8 % 2 * 8);
}

// ---- the schedule -----------------------------------------------------------------------------------------------------------

// Expert e has the rows [ends[e - 1], ends[e]): cumulative ends as PyTorch has them, kept inside [0, rows]. An expert whose end
// lies before its begin has none.
constexpr int bounded_end(int end, int rows) { return end < 0 ? 0 : end > rows ? rows : end; }
constexpr int rows_between(int begin, int end) { return end > begin ? end - begin : 0; }
constexpr int tiles_of(int rows, int tile_tokens, int channel_tiles) { return ceil_of(rows, tile_tokens) * channel_tiles; }

struct Place {
  int token_tile, channel_tile;
};

// A cluster's CTAs, which are neighbours in the grid, have tiles side by side: along channels, or along tokens. The first of `size`
// elements that is the CTA's, in the cluster's tile number `tile` along one of them, of `cluster` CTAs there.
constexpr int rank_of(int block, int cluster) { return block % cluster; }
constexpr int first_of(int tile, int size, int cluster, int block) { return (tile * cluster + rank_of(block, cluster)) * size; }

// The tiles of one expert in the order they are taken: `group` tiles of tokens together, and for them one tile of channels after
// the other. Tiles that share weights run at the same time, and `group` bounds the tokens that have to stay in L2.
constexpr Place place_of(int rest, int token_tiles, int channel_tiles, int group) {
  const int per_group = group * channel_tiles, which = rest / per_group, in_group = rest - which * per_group;
  const int first = which * group, together = token_tiles - first < group ? token_tiles - first : group;
  return {first + in_group % together, in_group / together};
}

// The columns that are multiplied for a tile with `valid` tokens: all N, half or a quarter, or of 256 three quarters. Half a tile
// of an expert's last tokens is empty on average, and wgmma takes as long as it has columns.
constexpr int columns_for(int valid, int tile_tokens) {
  if (tile_tokens == 256) return ceil_of(valid, 64) * 64;
  if (tile_tokens < 64 || valid > tile_tokens / 2) return tile_tokens;
  return valid > tile_tokens / 4 ? tile_tokens / 2 : tile_tokens / 4;
}

}  // namespace grouped
}  // namespace inductor_ext
