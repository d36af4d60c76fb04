/* Gatings (models/gating.py), compiled for each instruction set that includes this. Loops have whole chunks, so
 * that a value does not depend on where in memory it stands. What is not a number stays none. */
#include <math.h>

#include "bitsmoe.h"

#define GATING static inline __attribute__((always_inline))

/* exp to 2e-7: 2^round(x / ln 2) times the Taylor series at the remainder. */
GATING float exp_of(float x) {
  x = x < -87 ? -87 : x;
  x = x > 87 ? 87 : x;
  float shifted = x * 1.44269504f + 0x1.8p23f, whole = shifted - 0x1.8p23f; /* rounded: no fraction fits */
  float t = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * t + 1.0f / 720;
  p = p * t + 1.0f / 120;
  p = p * t + 1.0f / 24;
  p = p * t + 1.0f / 6;
  p = p * t + 0.5f;
  p = p * t + 1;
  p = p * t + 1;
  int32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (int32_t)((uint32_t)bits << 23) + 0x3f800000; /* the whole number is in the last bits */
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

/* x times the normal distribution function: Abramowitz and Stegun 7.1.26, to 1.5e-7 |x|. */
GATING float gelu_of(float x) {
  float size = (x < 0 ? -x : x) * 0.70710678f, t = 1 / (1 + 0.3275911f * size);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  float beyond = 0.5f * p * t * exp_of(-size * size);
  return x * (x < 0 ? beyond : 1 - beyond);
}

GATING float activation_of(int activation, float alpha, float x) {
  switch (activation) {
    case SILU: return x / (1 + exp_of(-alpha * x));
    case GELU: return gelu_of(x);
    case GELU_TANH: return x / (1 + exp_of(-1.59576912f * (x + 0.044715f * x * x * x)));
    case RELU: return x < 0 ? 0 : x;
    default: return x < 0 ? 0 : x * x;
  }
}

/* Lambert's continued fraction where 1 - 2 / (1 + exp) would cancel; to 3e-7. */
GATING float tanh_of(float x) {
  float size = x < 0 ? -x : x, z = x * x;
  float near = size * (945 + z * (105 + z)) / (945 + z * (420 + 15 * z));
  float t = size < 0.6f ? near : 1 - 2 / (1 + exp_of(2 * size));
  return x < 0 ? -t : t;
}

GATING float capped(float x, float cap) { return cap > 0 ? cap * tanh_of(x / cap) : x; }

/* Of SILU with soft caps. */
static void gate_capped(const GatingForm *form, const float *gate, const float *up, int chunks, float *out) {
  float alpha = form->alpha, gate_cap = form->gate_cap, up_cap = form->up_cap;
  for (; chunks > 0; chunks--, gate += CHUNK, up += CHUNK, out += CHUNK) {
    for (int i = 0; i < CHUNK; i++) out[i] = capped(gate[i], gate_cap) / (1 + exp_of(-alpha * gate[i]));
    for (int i = 0; i < CHUNK; i++) out[i] *= capped(up[i], up_cap);
  }
}

GATING void gate_of(const GatingForm *form, int activation, const float *gate, const float *up, int chunks, float *out) {
  float alpha = form->alpha, offset = form->offset, limit = form->limit;
  float limit_before = form->clamps_activation ? INFINITY : limit, limit_after = form->clamps_activation ? limit : INFINITY;
  for (; chunks > 0; chunks--, gate += CHUNK, out += CHUNK) {
    for (int i = 0; i < CHUNK; i++) {
      float x = gate[i] > limit_before ? limit_before : gate[i], y = activation_of(activation, alpha, x);
      out[i] = y > limit_after ? limit_after : y;
    }
    if (!up) continue;
    for (int i = 0; i < CHUNK; i++) {
      float x = up[i] > limit ? limit : up[i];
      out[i] *= (x < -limit ? -limit : x) + offset;
    }
    up += CHUNK;
  }
}

/* out = activation(gate) * up, or activation(gate) where up is NULL, with the form's limits; out may be gate. */
static void gate(const GatingForm *form, const float *gate, const float *up, int chunks, float *out) {
  if (form->gate_cap > 0 || form->up_cap > 0) {
    gate_capped(form, gate, up, chunks, out);
    return;
  }
  switch (form->activation) {
    case SILU: gate_of(form, SILU, gate, up, chunks, out); break;
    case GELU: gate_of(form, GELU, gate, up, chunks, out); break;
    case GELU_TANH: gate_of(form, GELU_TANH, gate, up, chunks, out); break;
    case RELU: gate_of(form, RELU, gate, up, chunks, out); break;
    case RELU2: gate_of(form, RELU2, gate, up, chunks, out); break;
  }
}
