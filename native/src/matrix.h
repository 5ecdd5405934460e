/* Matrices as stored, taken apart into planes. */
#ifndef HB_MATRIX_H
#define HB_MATRIX_H

#include <stdbool.h>

#include "halfbyte_program.h"
#include "kernels/kernels.h"

/* The row of the encoding table with this number, or NULL. */
const hb_encoding *hb_find_encoding(uint32_t number);

/* Whether an encoding may have this group and scale type. */
bool hb_parameters_are_valid(const hb_encoding *e, uint32_t group, uint32_t scale_type);

/* NULL, or why the matrix cannot be used. */
const char *hb_open_matrix(const hb_weight *w, hb_matrix *m);

/* The kernel family that multiplies by such a matrix: what decides is the width of its codes. */
const char *hb_linear_family(const hb_encoding *e, int policy);

#endif
