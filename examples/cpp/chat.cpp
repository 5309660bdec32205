// A streamed answer from an edgellm daemon, with cppzmq and msgpack-cxx. docs/protocol.md is the specification.
//
//     chat [-e ENDPOINT] [-n MAX_TOKENS] [-T TEMPERATURE] [-t SECONDS] QUESTION
//
// Exit codes: 0 answered, 1 the daemon refused, 64 usage, 69 nothing answers.

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unistd.h>

#include <msgpack.hpp>
#include <zmq.hpp>

namespace {

constexpr int kVersion = 1;
constexpr int kRefused = 1;
constexpr int kUsage = 64;
constexpr int kUnavailable = 69;

struct Arguments {
    std::string endpoint;
    std::string question;
    std::uint64_t max_tokens = 256;
    double temperature = 0.0;  // always the most likely token
    std::chrono::seconds timeout{60};  // for each message of the answer
};

// What the daemon says of a request that it refused or ended.
struct RequestError : std::runtime_error {
    RequestError(std::string code_, const std::string& message)
        : std::runtime_error(message), code(std::move(code_)) {}
    std::string code;
};

struct Unavailable : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A reply: a map whose fields are looked up by name, so that fields added later do no harm.
class Reply {
public:
    explicit Reply(const zmq::message_t& message)
        : handle_(msgpack::unpack(message.data<char>(), message.size())) {
        if (handle_.get().type != msgpack::type::MAP) {
            throw Unavailable("what answers does not speak edgellm's protocol");
        }
        for (const auto& entry : handle_.get().via.map) {
            if (entry.key.type == msgpack::type::STR) {
                fields_.emplace(entry.key.as<std::string>(), &entry.val);
            }
        }
    }

    template <typename T>
    T get(const std::string& name) const {
        return fields_.at(name)->as<T>();
    }

    // A field that may be null.
    template <typename T>
    std::optional<T> find(const std::string& name) const {
        const auto found = fields_.find(name);
        if (found == fields_.end() || found->second->is_nil()) {
            return std::nullopt;
        }
        return found->second->as<T>();
    }

private:
    msgpack::object_handle handle_;
    std::map<std::string, const msgpack::object*> fields_;
};

using Packer = msgpack::packer<msgpack::sbuffer>;

void pack_pair(Packer& packer, std::string_view key, std::string_view value) {
    packer.pack(key);
    packer.pack(value);
}

zmq::message_t chat_request(std::uint64_t id, const Arguments& arguments) {
    msgpack::sbuffer buffer;
    Packer packer(buffer);
    packer.pack_map(7);
    packer.pack("v");
    packer.pack(kVersion);
    packer.pack("id");
    packer.pack(id);
    pack_pair(packer, "op", "chat");
    packer.pack("stream");
    packer.pack(true);
    packer.pack("max_tokens");
    packer.pack(arguments.max_tokens);
    packer.pack("temperature");
    packer.pack(arguments.temperature);
    packer.pack("messages");
    packer.pack_array(1);
    packer.pack_map(2);
    pack_pair(packer, "role", "user");
    pack_pair(packer, "content", arguments.question);
    return {buffer.data(), buffer.size()};
}

// Print the answer as it comes.
void chat(const Arguments& arguments) {
    zmq::context_t context;
    zmq::socket_t socket(context, zmq::socket_type::dealer);
    socket.set(zmq::sockopt::linger, 0);
    socket.connect(arguments.endpoint);

    const std::uint64_t id = 1;  // ours to choose; unique among this socket's open requests
    auto request = chat_request(id, arguments);
    socket.send(request, zmq::send_flags::none);

    zmq::pollitem_t item{socket.handle(), 0, ZMQ_POLLIN, 0};
    for (;;) {
        if (zmq::poll(&item, 1, arguments.timeout) == 0) {
            throw Unavailable("no answer from " + arguments.endpoint);
        }
        zmq::message_t message;
        if (!socket.recv(message, zmq::recv_flags::none)) {
            continue;
        }
        const Reply reply(message);
        const auto event = reply.get<std::string>("ev");
        if (event == "error") {  // its id may be null, where ours could not be read
            auto text = reply.get<std::string>("message");
            if (const auto retry = reply.find<std::uint64_t>("retry_after_ms")) {
                text += " (try again in " + std::to_string(*retry) + " ms)";
            }
            throw RequestError(reply.get<std::string>("code"), text);
        }
        if (reply.find<std::uint64_t>("id") != id) {
            continue;
        }
        if (event == "delta") {
            std::cout << reply.get<std::string>("text") << std::flush;
        } else if (event == "done") {
            std::cout << std::endl;
            return;
        }  // accepted, and whatever a later version adds
    }
}

std::optional<Arguments> parse(int argc, char** argv) {
    Arguments arguments;
    const char* named = std::getenv("EDGELLM_ENDPOINT");
    arguments.endpoint = named != nullptr ? named : "ipc:///run/edgellm/edgellm.sock";
    int option = 0;
    while ((option = getopt(argc, argv, "e:n:T:t:")) != -1) {
        switch (option) {
            case 'e': arguments.endpoint = optarg; break;
            case 'n': arguments.max_tokens = std::strtoull(optarg, nullptr, 10); break;
            case 'T': arguments.temperature = std::strtod(optarg, nullptr); break;
            case 't': arguments.timeout = std::chrono::seconds(std::strtol(optarg, nullptr, 10)); break;
            default: return std::nullopt;
        }
    }
    if (optind + 1 != argc) {
        return std::nullopt;
    }
    arguments.question = argv[optind];
    return arguments;
}

}  // namespace

int main(int argc, char** argv) {
    const auto arguments = parse(argc, argv);
    if (!arguments) {
        std::cerr << "usage: chat [-e ENDPOINT] [-n MAX_TOKENS] [-T TEMPERATURE] [-t SECONDS] QUESTION\n";
        return kUsage;
    }
    try {
        chat(*arguments);
    } catch (const RequestError& error) {
        std::cerr << "chat: " << error.code << ": " << error.what() << '\n';
        return kRefused;
    } catch (const std::exception& error) {  // no daemon, no such endpoint, not this protocol
        std::cerr << "chat: " << error.what() << '\n';
        return kUnavailable;
    }
    return 0;
}
