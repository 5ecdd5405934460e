/* What this machine can run. */
#ifndef HB_CPU_H
#define HB_CPU_H

#include <stdbool.h>

bool hb_cpu_supports(int isa);
int hb_cpu_best(void);
int hb_cpu_count(void); /* processors this process may use */

#endif
