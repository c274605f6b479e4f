# SPDX-License-Identifier: MIT
# Configures, builds and runs tests/consumer against the installed package or with add_subdirectory.
# -Dmode=find_package|add_subdirectory -Dsource -Dbuild -Dwork -Dgenerator -Dcompiler [-Dlauncher -Dxsimd]
cmake_minimum_required(VERSION 3.25)

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE ${work})
set(arguments "-DCMAKE_BUILD_TYPE=Debug" "-DCMAKE_CXX_FLAGS_DEBUG=-O0" "-DCMAKE_CXX_COMPILER=${compiler}" "-DCMAKE_CXX_COMPILER_LAUNCHER=${launcher}"
  "-DFOVEA_XSIMD_INCLUDE_DIR=${xsimd}")
if(mode STREQUAL "find_package")
  # The package must survive being moved.
  run(${CMAKE_COMMAND} --install ${build} --prefix ${work}/first_place)
  file(RENAME ${work}/first_place ${work}/prefix)
  list(APPEND arguments "-DCMAKE_PREFIX_PATH=${work}/prefix")
elseif(mode STREQUAL "add_subdirectory")
  list(APPEND arguments "-DFOVEA_SOURCE=${source}")
else()
  message(FATAL_ERROR "unknown mode '${mode}'")
endif()

run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR} -B ${work}/build -G ${generator} ${arguments})
run(${CMAKE_COMMAND} --build ${work}/build --config Debug)
find_program(consumer consumer PATHS ${work}/build ${work}/build/Debug NO_DEFAULT_PATH REQUIRED)
run(${consumer})
