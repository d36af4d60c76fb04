/* Joint tables of lookup.h, one for each table and width in use. */
#include <stdlib.h>

#include "lookup.h"

typedef struct Joint {
  struct Joint *next;
  int bits;
  uint8_t table[256];
  uint8_t before[ENTRY]; /* zeros, see lookup.h */
  uint8_t entries[];
} Joint;

static Joint *new_joint(int bits, const uint8_t *table) {
  int count = 1 << joint_bits(bits);
  Joint *made = calloc(1, sizeof(Joint) + (size_t)count * ENTRY);
  if (!made) return NULL;
  made->bits = bits;
  memcpy(made->table, table, sizeof made->table);
  for (int i = 0; i < count; i++)
    for (int code = 0; code < joint_codes(bits); code++)
      made->entries[i * ENTRY + code] = table[i >> code * bits & 255];
  return made;
}

/* All layers share them, whose tables are the same, so they are kept for good. NULL without memory. */
const uint8_t *bitsmoe_joint_table(int bits, const uint8_t *table) {
  static Joint *all;
  Joint *found;
#pragma omp critical(bitsmoe_joint_tables)
  {
    for (found = all; found; found = found->next)
      if (found->bits == bits && !memcmp(found->table, table, sizeof found->table)) break;
    if (!found && (found = new_joint(bits, table))) {
      found->next = all;
      all = found;
    }
  }
  return found ? found->entries : NULL;
}
