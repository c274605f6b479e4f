# SPDX-License-Identifier: MIT
# fovea::compiled: the loops of every mechanism compiled once, for programs of many objects (core/config.hpp, FOVEA_COMPILED).
# Compiled with the flags of the project that links it: an instruction set is chosen as for any other source, and an object compiled
# for another one does not link against it. Its size and speed are those of the header-only library.
set(fovea_compiled_sources "")
foreach(part IN ITEMS softmax linear dijiang linformer efficient hybrid windowed registry)
  set(source ${PROJECT_BINARY_DIR}/compiled/${part}.cpp)
  if(part STREQUAL "registry")
    set(text "#define FOVEA_COMPILED 1\n#include <fovea/registry.hpp>\n\nFOVEA_COMPILE_REGISTRY\n")
  else()
    set(text "#define FOVEA_COMPILING 1\n#include <fovea/${part}.hpp>\n")
  endif()
  file(CONFIGURE OUTPUT ${source} CONTENT "${text}" @ONLY)
  list(APPEND fovea_compiled_sources ${source})
endforeach()
add_library(fovea_compiled STATIC EXCLUDE_FROM_ALL ${fovea_compiled_sources})
add_library(fovea::compiled ALIAS fovea_compiled)
target_link_libraries(fovea_compiled PUBLIC fovea::fovea)
target_compile_definitions(fovea_compiled INTERFACE FOVEA_COMPILED=1)
set_target_properties(fovea_compiled PROPERTIES CXX_EXTENSIONS OFF)
