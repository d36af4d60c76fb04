/* Trellis-coded blocks in plain C. Windows of neighbouring codes overlap, so a few bits more than one window
 * has are the index of several codes: a joint table holds the bytes of all of them in entries of four. More
 * codes per lookup would need tables that no longer fit a first-level cache. */
#ifndef BITSMOE_LOOKUP_H
#define BITSMOE_LOOKUP_H

#include <string.h>

#include "bitsmoe.h"

enum { WINDOW = 8, ENTRY = 4 };

#define INLINE static inline __attribute__((always_inline))

/* Codes of one lookup and the bits that index it: 8 to 16 KB of table for 1 to 4 bits. */
INLINE int joint_codes(int bits) { return bits == 1 ? 4 : bits == 2 ? 3 : 2; }
INLINE int joint_bits(int bits) { return WINDOW + (joint_codes(bits) - 1) * bits; }

/* Blocks of `bits` words, each a ring; code i's window ends at bit (i + 1) * bits of it. A rotation where a
 * shift would do: x86 has one that leaves its source in place. */
INLINE void lookup_blocks_of(const uint8_t *joint, const uint32_t *restrict words, int bits, int blocks,
                             uint8_t *restrict out) {
  int codes = joint_codes(bits), ring = BLOCK * bits;
  uint32_t mask = (1u << joint_bits(bits)) - 1;
  for (; blocks > 0; blocks--, words += bits, out += BLOCK) {
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i += codes) {
      int start = ((i + 1) * bits - WINDOW + ring) % ring, word = start / 32, shift = start % 32;
      uint64_t pair = words[word] | (uint64_t)words[(word + 1) % bits] << 32;
      const uint8_t *found = joint + ENTRY * ((pair >> shift | pair << (-shift & 63)) & mask);
      if (i + ENTRY <= BLOCK && codes > 2) memcpy(out + i, found, ENTRY);
      else memcpy(out + i, found, 2); /* a third code would lie beyond the block */
    }
  }
}

/* Trellis-coded blocks, 1 to 4 bits. */
INLINE void lookup_blocks(const Decoder *d, const uint32_t *words, int blocks, uint8_t *out) {
  switch (d->bits) {
    case 1: lookup_blocks_of(d->joint, words, 1, blocks, out); break;
    case 2: lookup_blocks_of(d->joint, words, 2, blocks, out); break;
    case 3: lookup_blocks_of(d->joint, words, 3, blocks, out); break;
    case 4: lookup_blocks_of(d->joint, words, 4, blocks, out); break;
  }
}
#endif
