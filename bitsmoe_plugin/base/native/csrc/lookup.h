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

/* The entry of code i and those after it. A block of `bits` words is a ring; code i's window ends at bit
 * (i + 1) * bits of it. A rotation where a shift would do: x86 has one that leaves its source in place. */
INLINE const uint8_t *joint_entry(const uint8_t *joint, const uint32_t *words, int bits, int i) {
  int ring = BLOCK * bits, start = ((i + 1) * bits - WINDOW + ring) % ring, word = start / 32, shift = start % 32;
  uint64_t pair = words[word] | (uint64_t)words[(word + 1) % bits] << 32;
  return joint + ENTRY * ((pair >> shift | pair << (-shift & 63)) & ((1u << joint_bits(bits)) - 1));
}

INLINE uint32_t word_at(const uint8_t *from) {
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

INLINE void lookup_blocks_of(const uint8_t *joint, const uint32_t *restrict words, int bits, int blocks,
                             uint8_t *restrict out) {
  int codes = joint_codes(bits);
  for (; blocks > 0; blocks--, words += bits, out += BLOCK) {
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i += codes > 2 ? codes : 4) {
      uint32_t found = word_at(joint_entry(joint, words, bits, i));
      /* two bytes before an entry of two codes there are the zeros of the one before */
      if (codes == 2) found |= word_at(joint_entry(joint, words, bits, i + 2) - 2);
      memcpy(out + i, &found, i + ENTRY <= BLOCK ? ENTRY : 2); /* a block's last two codes: no third */
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
