// A test is TEST(name) { ... CHECK(...) ... }. A program runs those it is given by name, or all, and prints one line each.
#pragma once
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace testing {

inline std::vector<std::pair<const char*, void (*)()>>& tests() {
  static std::vector<std::pair<const char*, void (*)()>> all;
  return all;
}

struct Registered {
  Registered(const char* name, void (*test)()) { tests().emplace_back(name, test); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::ostringstream message;
  message << file << ":" << line << ": " << what;
  throw std::runtime_error(message.str());
}

}  // namespace testing

#define TEST(name)                                                  \
  static void name();                                               \
  static const testing::Registered registered_##name(#name, &name); \
  static void name()

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) testing::fail(__FILE__, __LINE__, #condition); \
  } while (false)

// a and b are printed where they differ.
#define CHECK_EQUAL(a, b)                                                        \
  do {                                                                           \
    const auto& left_ = (a);                                                     \
    const auto& right_ = (b);                                                    \
    if (!(left_ == right_)) {                                                    \
      std::ostringstream values_;                                                \
      values_ << #a << " is " << left_ << ", expected " << #b << ", " << right_; \
      testing::fail(__FILE__, __LINE__, values_.str());                          \
    }                                                                            \
  } while (false)

// The expression throws `type`, whose message holds every one of the given texts.
#define CHECK_THROWS(type, expression, ...)                                                              \
  do {                                                                                                   \
    bool thrown_ = false;                                                                                \
    try {                                                                                                \
      (void)(expression);                                                                                \
    } catch (const type& error_) {                                                                       \
      thrown_ = true;                                                                                    \
      for (const char* text_ : {__VA_ARGS__})                                                            \
        if (std::string(error_.what()).find(text_) == std::string::npos)                                 \
          testing::fail(__FILE__, __LINE__, "'" + std::string(text_) + "' is not in: " + error_.what()); \
    }                                                                                                    \
    if (!thrown_) testing::fail(__FILE__, __LINE__, #expression " did not throw " #type);                \
  } while (false)
