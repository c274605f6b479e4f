// SPDX-License-Identifier: MIT
#pragma once
/// @file  Configurations as JSON text (nlohmann-json): one flat object, {"mechanism": "softmax", "causal": true, "window": 256}.
///
///   any_attention a = any_attention::make(read_configuration("config.json"), weights);
///   write_configuration("config.json", a.config());
///
/// Contract   values are true or false, numbers, texts, or lists of numbers; a key may stand once. Reading what was written gives
///            the same configuration, numbers to the last bit.
/// Errors     file_error, one line: "PATH: line 3, column 7: ..."; configuration_from_json throws contract_error.

#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <fovea/core/configuration.hpp>
#include <fovea/interop/file.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// One JSON value as a value of a configuration. `key` is named in errors.
inline configuration_value value_from_json(const std::string& key, const nlohmann::json& v) {
  if (v.is_boolean()) return v.get<bool>();
  if (v.is_number()) return v.get<double>();
  if (v.is_string()) return v.get<std::string>();
  require(v.is_array(), "key \"", key, "\" is ", v.type_name(),
          "; wanted true or false, a number, a text or a list of numbers");
  std::vector<double> list;
  for (const auto& x : v) {
    require(x.is_number(), "key \"", key, "\" is a list that holds ", x.type_name(), "; wanted numbers");
    list.push_back(x.get<double>());
  }
  return list;
}

inline configuration configuration_from_json(const nlohmann::json& j) {
  require(j.is_object(), "a configuration is ", j.type_name(), "; wanted an object {\"mechanism\": ..., ...}");
  require(j.contains("mechanism"), "key \"mechanism\" is missing");
  require(j["mechanism"].is_string(), "key \"mechanism\" is ", j["mechanism"].type_name(), "; wanted a text");
  configuration c{j["mechanism"].get<std::string>(), {}};
  for (const auto& [key, v] : j.items())
    if (key != "mechanism") c.values.emplace(key, value_from_json(key, v));
  return c;
}

inline nlohmann::json to_json(const configuration& c) {
  nlohmann::json j = {{"mechanism", c.mechanism}};
  for (const auto& [key, value] : c.values) {
    nlohmann::json& slot = j[key];
    const auto* x = std::get_if<double>(&value);
    if (x != nullptr && *x == std::floor(*x) && std::abs(*x) < 9007199254740992.0)
      slot = static_cast<std::int64_t>(*x);  // 256, not 256.0
    else
      std::visit([&slot](const auto& v) { slot = v; }, value);
  }
  return j;
}

/// JSON text with duplicate keys, deep nesting and syntax errors refused in one line. `name` is the file that errors name.
inline nlohmann::json parse_json(std::string_view text, const std::string& name, int depth_limit = 16) {
  using event_type = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> open;
  const auto watch = [&](int, event_type event, nlohmann::json& parsed) {
    if (event == event_type::object_start || event == event_type::array_start) open.emplace_back();
    if (event == event_type::object_end || event == event_type::array_end) open.pop_back();
    if (static_cast<int>(open.size()) > depth_limit)
      throw file_error(name, "is nested more than " + std::to_string(depth_limit) + " deep");
    if (event == event_type::key && !open.back().insert(parsed.get<std::string>()).second)
      throw file_error(name, "key " + parsed.dump() + " is there twice");
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& e) {
    std::string what = e.what();  // "[json.exception.parse_error.101] parse error at line 1, column 3: ..."
    if (const auto end = what.find("] "); what.starts_with('[') && end != std::string::npos) what.erase(0, end + 2);
    if (what.starts_with("parse error at ")) what.erase(0, 15);
    for (char& c : what)
      if (static_cast<unsigned char>(c) < 0x20) c = ' ';
    throw file_error(name, what);
  }
}

inline configuration parse_configuration(std::string_view text, const std::string& name) {
  const nlohmann::json j = parse_json(text, name);
  try {
    return configuration_from_json(j);
  } catch (const contract_error& e) {
    throw file_error(name, e);
  }
}

inline configuration read_configuration(const std::string& path) {
  return parse_configuration(read_text(path, 16'000'000), path);
}

inline void write_configuration(const std::string& path, const configuration& c) {
  const std::string text = to_json(c).dump(2) + "\n";
  write_whole(path, [&](std::ofstream& out) { out << text; });
}

}  // namespace FOVEA_ABI
}  // namespace fovea
