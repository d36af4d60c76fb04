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

/* A block of `bits` words is a ring; code i's window ends at bit (i + 1) * bits of it. */
INLINE void lookup_block_of(const uint8_t *joint, const uint32_t *words, int bits, uint8_t *out) {
  int codes = joint_codes(bits), ring = BLOCK * bits;
  uint32_t mask = (1u << joint_bits(bits)) - 1;
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK; i += codes) {
    int start = ((i + 1) * bits - WINDOW + ring) % ring, word = start / 32;
    uint64_t pair = words[word] | (uint64_t)words[(word + 1) % bits] << 32;
    const uint8_t *found = joint + ENTRY * (pair >> start % 32 & mask);
    if (i + ENTRY <= BLOCK && codes > 2) memcpy(out + i, found, ENTRY);
    else memcpy(out + i, found, 2); /* a third code would lie beyond the block */
  }
}

/* `blocks` blocks, 1 to 4 bits. */
INLINE void lookup_blocks(const Decoder *d, const uint32_t *words, int blocks, uint8_t *out) {
  for (int b = 0; b < blocks; b++, words += d->bits, out += BLOCK) switch (d->bits) {
      case 1: lookup_block_of(d->joint, words, 1, out); break;
      case 2: lookup_block_of(d->joint, words, 2, out); break;
      case 3: lookup_block_of(d->joint, words, 3, out); break;
      case 4: lookup_block_of(d->joint, words, 4, out); break;
    }
}
#endif
