// SPDX-License-Identifier: MIT
/// @file  attend IN.safetensors CONFIG.json OUT.safetensors [--threads N] [--decode P]
///
/// Applies one configured mechanism to the tensors q, k, v of a file and writes o, and where they exist lse, S, z (with a tensor
/// `do`, gradients): the way to check fovea against another framework. Keys and tensors: docs/attend.md.
///
/// Errors   one line on stderr, exit code 2, and no output file.

#include <stdexcept>
#include <string>

#include <CLI/CLI.hpp>

#include <fovea/any_attention.hpp>
#include <fovea/interop/json.hpp>
#include <fovea/interop/safetensors.hpp>
#include <fovea/version.hpp>

#include "attend/gradients.hpp"
#include "common/complain.hpp"

namespace {

struct arguments {
  std::string input, config, output;
  int threads = 1;
  fovea::isize decode = -1;
};

/// `what` happens for the files in `where`: contract errors get their names.
template <class F>
auto naming(const std::string& where, F&& what) {
  try {
    return what();
  } catch (const fovea::contract_error& e) {
    throw fovea::file_error(where, e);
  }
}

void run(const arguments& a) {
  const fovea::configuration config = fovea::read_configuration(a.config);
  fovea::safetensors_file in = fovea::read_safetensors(a.input);
  attend::question ask = naming(a.input, [&] { return attend::take_inputs(std::move(in.tensors)); });
  const auto mechanism = naming(a.config + ", " + a.input, [&] { return attend::make(config, ask); });
  const fovea::threads pool(a.threads);
  const bool differentiate = ask.dout.has_value();
  const fovea::arrays out = naming(a.input, [&] {
    if (differentiate) attend::check_gradients(mechanism, ask, a.decode >= 0);
    fovea::arrays all =
        a.decode < 0 ? attend::prefill(pool, mechanism, ask) : attend::decode(pool, mechanism, ask, a.decode);
    if (differentiate) all.merge(attend::gradients(pool, mechanism, ask, all));
    return all;
  });
  fovea::write_safetensors(a.output, out, {{"mechanism", mechanism.name()}, {"fovea", FOVEA_VERSION_STRING}});
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "Applies one attention mechanism to tensors q [B,H,n,d], k [B,G,m,d], v [B,G,m,e] of a safetensors file."};
  arguments a;
  app.add_option("IN", a.input, "safetensors file with q, k, v and what else the mechanism takes")->required();
  app.add_option("CONFIG", a.config, "JSON: {\"mechanism\": \"softmax\", \"causal\": true, ...}")->required();
  app.add_option("OUT", a.output, "safetensors file to write: o, and where they exist lse, S, z")->required();
  app.add_option("--threads", a.threads, "threads (default 1); the result does not depend on it")
      ->check(CLI::Range(1, 1024));
  app.add_option("--decode", a.decode, "prefill the first P tokens, then step through the rest one by one")
      ->check(CLI::Range(fovea::isize{0}, fovea::isize{1} << 40));
  app.set_version_flag("--version", FOVEA_VERSION_STRING);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    return complain("attend", e.what());
  }
  try {
    run(a);
    return 0;
  } catch (const std::bad_alloc&) {
    return complain("attend", a.input + ": not enough memory");
  } catch (const std::exception& e) {
    return complain("attend", e.what());
  }
}
