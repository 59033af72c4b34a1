// Host side of kernel launches; sadp_fast/ops/common/launch.py is its only user.
#pragma once

#include <pybind11/pybind11.h>

namespace sadp {

void bind_launch(pybind11::module_& module);

}  // namespace sadp
