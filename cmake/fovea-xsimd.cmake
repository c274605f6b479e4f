# SPDX-License-Identifier: MIT
# fovea::xsimd: xsimd's include directory as an imported target of our own. Used by the build and by the installed package.
# xsimd 8.1's CMake target links a library `xtl` that need not exist, and copies of xsimd often come without CMake files at all.
# Sets fovea_xsimd_FOUND, or fovea_xsimd_NOT_FOUND_MESSAGE.
set(fovea_xsimd_FOUND FALSE)
if(TARGET fovea::xsimd)
  set(fovea_xsimd_FOUND TRUE)
  return()
endif()

set(fovea_xsimd_minimum 8.1.0)
if(NOT FOVEA_XSIMD_INCLUDE_DIR)
  unset(FOVEA_XSIMD_INCLUDE_DIR CACHE)
  find_path(FOVEA_XSIMD_INCLUDE_DIR xsimd/xsimd.hpp HINTS ${xsimd_ROOT} $ENV{xsimd_ROOT} PATH_SUFFIXES include
    DOC "The folder that holds xsimd/xsimd.hpp")
endif()

set(fovea_xsimd_config "${FOVEA_XSIMD_INCLUDE_DIR}/xsimd/config/xsimd_config.hpp")
if(NOT FOVEA_XSIMD_INCLUDE_DIR OR NOT EXISTS "${fovea_xsimd_config}")
  set(fovea_xsimd_NOT_FOUND_MESSAGE
    "fovea needs xsimd >= ${fovea_xsimd_minimum} (Debian: libxsimd-dev); set FOVEA_XSIMD_INCLUDE_DIR to the folder that holds xsimd/xsimd.hpp (it is '${FOVEA_XSIMD_INCLUDE_DIR}')")
else()
  set(fovea_xsimd_version "")
  foreach(part IN ITEMS MAJOR MINOR PATCH)
    file(STRINGS "${fovea_xsimd_config}" line REGEX "#define XSIMD_VERSION_${part} ")
    string(REGEX MATCH "[0-9]+" number "${line}")
    list(APPEND fovea_xsimd_version "${number}")
  endforeach()
  list(JOIN fovea_xsimd_version "." fovea_xsimd_version)
  if(fovea_xsimd_version VERSION_LESS fovea_xsimd_minimum)
    set(fovea_xsimd_NOT_FOUND_MESSAGE
      "fovea needs xsimd >= ${fovea_xsimd_minimum}, but ${FOVEA_XSIMD_INCLUDE_DIR} holds ${fovea_xsimd_version}")
  else()
    set(fovea_xsimd_FOUND TRUE)
    add_library(fovea::xsimd INTERFACE IMPORTED GLOBAL)
    set_target_properties(fovea::xsimd PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${FOVEA_XSIMD_INCLUDE_DIR}")
  endif()
endif()

if(NOT fovea_xsimd_FOUND AND NOT CMAKE_FIND_PACKAGE_NAME STREQUAL "fovea")
  message(FATAL_ERROR "${fovea_xsimd_NOT_FOUND_MESSAGE}")
endif()
