"""Where a C++ program finds the library: its headers, itself, and its CMake package, installed or editable.

    cmake -S . -B build -DCMAKE_PREFIX_PATH="$(python -c 'from fastmoe_cpp import cpp; print(cpp.cmake_prefix_path)')"

and in CMakeLists.txt ``find_package(fastmoe_cpp REQUIRED)``, ``target_link_libraries(app fastmoe_cpp::fastmoe_cpp)``.
"""

from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent

#: For CMAKE_PREFIX_PATH: this package and the LibTorch inside the installed torch, as a CMake list.
cmake_prefix_path: str = f"{_PACKAGE};{Path(torch.__file__).resolve().parent}"
#: For a compiler: holds fastmoe_cpp/fastmoe_cpp.h.
include_dir: str = str(_PACKAGE / "include")
#: For a linker: holds libfastmoe_cpp.so.
library_dir: str = str(_PACKAGE)
