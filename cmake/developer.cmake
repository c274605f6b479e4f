# SPDX-License-Identifier: MIT
# How our own tests, benchmarks and examples are compiled. Nothing here reaches a user of fovea::fovea.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12)
  message(FATAL_ERROR "fovea needs g++ 12 or newer; this is ${CMAKE_CXX_COMPILER_VERSION}. Set CXX to another compiler.")
elseif(CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
  message(FATAL_ERROR "fovea needs clang 14 or newer; this is ${CMAKE_CXX_COMPILER_VERSION}. Set CXX to another compiler.")
endif()

if(PROJECT_IS_TOP_LEVEL)
  set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
  set(CMAKE_CXX_EXTENSIONS OFF)
endif()

add_library(fovea_developer INTERFACE)
target_compile_features(fovea_developer INTERFACE cxx_std_20)
target_compile_options(fovea_developer INTERFACE
  -Wall -Wextra -Wpedantic -Wconversion -Wshadow $<$<BOOL:${FOVEA_WERROR}>:-Werror>)

if(FOVEA_ARCH_FLAGS)
  separate_arguments(fovea_arch_flags UNIX_COMMAND "${FOVEA_ARCH_FLAGS}")
  target_compile_options(fovea_developer INTERFACE ${fovea_arch_flags})
elseif(FOVEA_NATIVE)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native fovea_has_march_native)
  check_cxx_compiler_flag(-mcpu=native fovea_has_mcpu_native)
  if(fovea_has_march_native)
    target_compile_options(fovea_developer INTERFACE -march=native)
  elseif(fovea_has_mcpu_native)
    target_compile_options(fovea_developer INTERFACE -mcpu=native)
  endif()
endif()

# g++ warns falsely about its own library under sanitisers: warnings are judged by the other builds.
# Left out are checks that take g++ 12 three to five times as long to compile as all others together, and find what the
# others find as well: use after scope, and null (a crash either way).
if(FOVEA_SANITIZE)
  target_compile_options(fovea_developer INTERFACE
    -fsanitize=${FOVEA_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  if(FOVEA_SANITIZE MATCHES "undefined")
    target_compile_options(fovea_developer INTERFACE -fno-sanitize=null,vptr,object-size)
  endif()
  if(FOVEA_SANITIZE MATCHES "address")
    target_compile_options(fovea_developer INTERFACE -fno-sanitize-address-use-after-scope)
  endif()
  target_link_options(fovea_developer INTERFACE -fsanitize=${FOVEA_SANITIZE})
endif()

# The headers' own check (target all_verify_interface_header_sets) is compiled with the same flags.
if(PROJECT_IS_TOP_LEVEL)
  get_target_property(fovea_developer_options fovea_developer INTERFACE_COMPILE_OPTIONS)
  set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY COMPILE_OPTIONS ${fovea_developer_options})
endif()

target_link_libraries(fovea_compiled PRIVATE fovea_developer)

# fovea_add_program(NAME SOURCES ... LIBRARIES ...): an executable with our flags.
function(fovea_add_program name)
  cmake_parse_arguments(arg "" "" "SOURCES;LIBRARIES" ${ARGN})
  add_executable(${name} ${arg_SOURCES})
  set_target_properties(${name} PROPERTIES CXX_EXTENSIONS OFF)
  target_link_libraries(${name} PRIVATE fovea::fovea ${arg_LIBRARIES} fovea_developer)
endfunction()

# The Python that the tests run: with numpy where one has it. FOVEA_PYTHON is empty where there is none.
if(NOT FOVEA_PYTHON)
  unset(FOVEA_PYTHON CACHE)
  foreach(candidate IN ITEMS python3 /usr/bin/python3 python)
    find_program(fovea_python_candidate ${candidate} NO_CACHE)
    if(fovea_python_candidate)
      execute_process(COMMAND ${fovea_python_candidate} -c "import numpy" RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
      if(NOT failed)
        set(FOVEA_PYTHON ${fovea_python_candidate} CACHE FILEPATH "A Python 3 with numpy")
        break()
      endif()
    endif()
    unset(fovea_python_candidate)
  endforeach()
endif()
