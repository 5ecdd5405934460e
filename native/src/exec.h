/* The loop over bound records. */
#ifndef HB_EXEC_H
#define HB_EXEC_H

#include "bind.h"

int hb_execute(hb_program *program, const hb_step *step, uint32_t first, uint32_t last);

#endif
