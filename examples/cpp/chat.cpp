// A streamed answer from an edgellm daemon, with cppzmq and msgpack-cxx. docs/protocol.md is the specification.
//
//     chat [-e ENDPOINT] [-n MAX_TOKENS] [-T TEMPERATURE] [-t SECONDS] QUESTION
//
// Exit codes: 0 answered, 1 the daemon refused, 64 usage, 69 nothing answers.

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>
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
constexpr std::chrono::milliseconds kConnect{2000};  // for a daemon to be there

struct Arguments {
    std::string endpoint;
    std::string question;
    std::uint64_t max_tokens = 256;
    double temperature = 0.0;  // always the most likely token
    std::chrono::milliseconds timeout{60'000};  // for each message of the answer
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

// What the connection's monitor says: whether a daemon has been met, and whether it is gone again. Without it a
// socket waits in silence: libzmq connects again and again, and never says that nobody is there.
class Connection {
public:
    Connection(zmq::context_t& context, zmq::socket_t& socket) : events_(context, zmq::socket_type::pair) {
        const char* address = "inproc://connection";
        const int watched = ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED;
        if (zmq_socket_monitor(socket.handle(), address, watched) != 0) {
            throw zmq::error_t();
        }
        events_.connect(address);
    }

    void* handle() { return events_.handle(); }
    bool met() const { return met_; }
    bool lost() const { return lost_; }

    // Take what was reported; zmq_socket_monitor(3): a frame that begins with the event's number, and the endpoint.
    void read() {
        zmq::message_t event;
        while (events_.recv(event, zmq::recv_flags::dontwait)) {
            std::uint16_t number = 0;
            std::memcpy(&number, event.data(), sizeof number);
            met_ = met_ || number == ZMQ_EVENT_HANDSHAKE_SUCCEEDED;
            lost_ = lost_ || (met_ && number == ZMQ_EVENT_DISCONNECTED);
            (void)events_.recv(event, zmq::recv_flags::none);
        }
    }

private:
    zmq::socket_t events_;
    bool met_ = false;
    bool lost_ = false;
};

// Why nobody is heard at an endpoint.
std::string obstacle(const std::string& endpoint) {
    const std::string scheme = "ipc://";
    if (endpoint.compare(0, scheme.size(), scheme) == 0 &&
        access(endpoint.c_str() + scheme.size(), W_OK) != 0 && errno == EACCES) {
        return "permission denied at " + endpoint + ": join the group that owns it (edgellm) and log in again";
    }
    return "nothing serves at " + endpoint;
}

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
    socket.set(zmq::sockopt::linger, 0);  // do not wait for a daemon that never came
    Connection connection(context, socket);
    socket.connect(arguments.endpoint);

    // The request waits in the socket until there is a daemon.
    const std::uint64_t id = 1;  // ours to choose; unique among this socket's open requests
    auto request = chat_request(id, arguments);
    socket.send(request, zmq::send_flags::none);

    zmq::pollitem_t items[] = {{socket.handle(), 0, ZMQ_POLLIN, 0}, {connection.handle(), 0, ZMQ_POLLIN, 0}};
    for (;;) {
        const auto patience = connection.met() ? arguments.timeout : std::min(arguments.timeout, kConnect);
        if (zmq::poll(items, 2, patience) == 0) {
            throw Unavailable(connection.met() ? "no answer from " + arguments.endpoint
                                               : obstacle(arguments.endpoint));
        }
        connection.read();  // first what happened, then what arrived: a daemon's last words come before its end
        zmq::message_t message;
        if (!socket.recv(message, zmq::recv_flags::dontwait)) {
            if (connection.lost()) {
                throw Unavailable("the daemon at " + arguments.endpoint + " went away");
            }
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

// A number, the whole of the text, not negative; or nothing.
template <typename T>
std::optional<T> number(const char* text) {
    std::istringstream stream(text);
    T value{};
    if (*text == '-' || !(stream >> value) || !stream.eof()) {
        return std::nullopt;
    }
    return value;
}

std::optional<Arguments> parse(int argc, char** argv) {
    Arguments arguments;
    const char* named = std::getenv("EDGELLM_ENDPOINT");
    arguments.endpoint = named != nullptr ? named : "ipc:///run/edgellm/edgellm.sock";
    int option = 0;
    while ((option = getopt(argc, argv, "e:n:T:t:")) != -1) {
        if (option == '?') {
            return std::nullopt;
        }
        if (option == 'e') {
            arguments.endpoint = optarg;
        } else if (const auto value = number<double>(optarg); option == 'T' && value) {
            arguments.temperature = *value;
        } else if (const auto count = number<std::uint32_t>(optarg); option == 'n' && count) {
            arguments.max_tokens = *count;
        } else if (option == 't' && count) {
            arguments.timeout = std::chrono::seconds(*count);
        } else {
            return std::nullopt;
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
