#include <halfbyte.h>
