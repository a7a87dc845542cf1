// All kernels for one instruction set, compiled once for each: CBAM_LEVEL names the table, CBAM_BYTES is the width of
// a vector, and the compiler's flags select the instructions.
#include "backward.h"

namespace cbam {

const Level CBAM_LEVEL = {
    {forward<half>, forward<bfloat>, forward<float>, forward<double>},
    {backward<half>, backward<bfloat>, backward<float>, backward<double>},
};

}  // namespace cbam
