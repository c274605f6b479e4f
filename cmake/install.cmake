# SPDX-License-Identifier: MIT
# The installed package: find_package(fovea [COMPONENTS json eigen]).
include(CMakePackageConfigHelpers)
set(fovea_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fovea)

install(TARGETS fovea EXPORT fovea-targets FILE_SET HEADERS FILE_SET cuda_headers)
install(EXPORT fovea-targets NAMESPACE fovea:: DESTINATION ${fovea_package_dir})
foreach(bridge IN ITEMS json eigen)
  if(TARGET fovea_${bridge})
    install(TARGETS fovea_${bridge} EXPORT fovea-${bridge}-targets FILE_SET HEADERS)
    install(EXPORT fovea-${bridge}-targets NAMESPACE fovea:: DESTINATION ${fovea_package_dir})
  endif()
endforeach()

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/fovea-config.cmake.in ${PROJECT_BINARY_DIR}/fovea-config.cmake
  INSTALL_DESTINATION ${fovea_package_dir})
# Before 1.0 a minor release may break: the same minor version is asked for. The headers serve every word size.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/fovea-config-version.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES
  ${PROJECT_BINARY_DIR}/fovea-config.cmake
  ${PROJECT_BINARY_DIR}/fovea-config-version.cmake
  ${CMAKE_CURRENT_LIST_DIR}/fovea-xsimd.cmake
  DESTINATION ${fovea_package_dir})
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
