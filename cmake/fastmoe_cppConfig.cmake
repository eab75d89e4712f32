# find_package(fastmoe_cpp) gives the imported target fastmoe_cpp::fastmoe_cpp: the headers, libfastmoe_cpp.so, and the
# LibTorch it was built for. The prefix path is what `python -c "from fastmoe_cpp import cpp; print(cpp.cmake_prefix_path)"`
# prints.
#
# LibTorch: a project that has called find_package(Torch) keeps that. Otherwise this file names LibTorch's headers and
# libraries itself, because TorchConfig.cmake of a CUDA build of torch stops where no CUDA toolkit is installed, though
# neither compiling nor running a CPU program needs one. A project that compiles CUDA code of its own against LibTorch
# calls find_package(Torch) first.
#
# fastmoe_cpp_TORCH_ROOT names the installed torch package where it is not found through CMAKE_PREFIX_PATH.

get_filename_component(_fastmoe_cpp_package "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

function(_fastmoe_cpp_not_found reason)
  set(fastmoe_cpp_FOUND FALSE PARENT_SCOPE)
  set(fastmoe_cpp_NOT_FOUND_MESSAGE "${reason}" PARENT_SCOPE)
endfunction()

if(NOT EXISTS "${_fastmoe_cpp_package}/libfastmoe_cpp.so")
  _fastmoe_cpp_not_found("${_fastmoe_cpp_package} has no libfastmoe_cpp.so: build it with pip install --no-build-isolation .")
  return()
endif()

if(NOT TARGET torch)
  find_path(fastmoe_cpp_TORCH_ROOT NAMES share/cmake/Torch/TorchConfig.cmake
            HINTS "${_fastmoe_cpp_package}/../torch"
            DOC "The installed torch package: the folder of include, lib and share")
  if(NOT fastmoe_cpp_TORCH_ROOT)
    _fastmoe_cpp_not_found("LibTorch was not found: add the torch package's folder to CMAKE_PREFIX_PATH or set fastmoe_cpp_TORCH_ROOT")
    return()
  endif()

  # Objects fit one release of torch.
  set(_fastmoe_cpp_built "")
  set(_fastmoe_cpp_torch "")
  if(EXISTS "${_fastmoe_cpp_package}/_build.py")
    file(STRINGS "${_fastmoe_cpp_package}/_build.py" _fastmoe_cpp_line REGEX "^BUILD")
    if(_fastmoe_cpp_line MATCHES "'torch': '([0-9]+\\.[0-9]+)")
      set(_fastmoe_cpp_built "${CMAKE_MATCH_1}")
    endif()
  endif()
  if(EXISTS "${fastmoe_cpp_TORCH_ROOT}/version.py")
    file(STRINGS "${fastmoe_cpp_TORCH_ROOT}/version.py" _fastmoe_cpp_line REGEX "^__version__")
    if(_fastmoe_cpp_line MATCHES "'([0-9]+\\.[0-9]+)")
      set(_fastmoe_cpp_torch "${CMAKE_MATCH_1}")
    endif()
  endif()
  if(_fastmoe_cpp_built AND _fastmoe_cpp_torch AND NOT _fastmoe_cpp_built STREQUAL _fastmoe_cpp_torch)
    _fastmoe_cpp_not_found("libfastmoe_cpp.so was built for torch ${_fastmoe_cpp_built}, and ${fastmoe_cpp_TORCH_ROOT} is torch ${_fastmoe_cpp_torch}: build fastmoe_cpp again for it")
    return()
  endif()

  if(NOT TARGET fastmoe_cpp::torch)
    # The language standard that LibTorch's headers ask for.
    file(STRINGS "${fastmoe_cpp_TORCH_ROOT}/include/ATen/ATen.h" _fastmoe_cpp_line REGEX "__cplusplus < ")
    set(_fastmoe_cpp_standard 17)
    if(_fastmoe_cpp_line MATCHES "__cplusplus < 20([0-9][0-9])")
      set(_fastmoe_cpp_standard "${CMAKE_MATCH_1}")
    endif()
    add_library(fastmoe_cpp::torch INTERFACE IMPORTED)
    set_target_properties(fastmoe_cpp::torch PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${fastmoe_cpp_TORCH_ROOT}/include;${fastmoe_cpp_TORCH_ROOT}/include/torch/csrc/api/include"
      INTERFACE_COMPILE_FEATURES "cxx_std_${_fastmoe_cpp_standard}")
    set(_fastmoe_cpp_libraries "")
    foreach(_fastmoe_cpp_name torch torch_cpu c10 torch_cuda c10_cuda)
      set(_fastmoe_cpp_file "${fastmoe_cpp_TORCH_ROOT}/lib/lib${_fastmoe_cpp_name}.so")
      if(EXISTS "${_fastmoe_cpp_file}")
        list(APPEND _fastmoe_cpp_libraries "${_fastmoe_cpp_file}")
      endif()
    endforeach()
    # Nothing calls into torch_cuda by name: it registers its kernels when it is loaded, so the linker must keep it.
    set_property(TARGET fastmoe_cpp::torch PROPERTY INTERFACE_LINK_LIBRARIES
      "-Wl,--push-state,--no-as-needed" ${_fastmoe_cpp_libraries} "-Wl,--pop-state")
  endif()
  set(_fastmoe_cpp_libtorch fastmoe_cpp::torch)
else()
  set(_fastmoe_cpp_libtorch ${TORCH_LIBRARIES})
endif()

if(NOT TARGET fastmoe_cpp::fastmoe_cpp)
  add_library(fastmoe_cpp::fastmoe_cpp SHARED IMPORTED)
  set_target_properties(fastmoe_cpp::fastmoe_cpp PROPERTIES
    IMPORTED_LOCATION "${_fastmoe_cpp_package}/libfastmoe_cpp.so"
    IMPORTED_SONAME "libfastmoe_cpp.so"
    INTERFACE_INCLUDE_DIRECTORIES "${_fastmoe_cpp_package}/include"
    INTERFACE_LINK_LIBRARIES "${_fastmoe_cpp_libtorch}")
endif()
set(fastmoe_cpp_FOUND TRUE)
