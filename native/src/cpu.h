/* What this machine can run. */
#ifndef HB_CPU_H
#define HB_CPU_H

#include <stdbool.h>

bool hb_cpu_supports(int isa);
int hb_cpu_rank(int isa); /* place in the order of preference; of a set that does not exist -1 */
int hb_cpu_best(void);
int hb_cpu_count(void); /* processors this process may use */

#endif
