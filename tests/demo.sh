#!/usr/bin/env bash
# Shows an installed hostport plugin at work: a node, two pods and an outside client, in network namespaces of their own.
set -euo pipefail

plugin=${1:?usage: demo.sh PATH-OF-HOSTPORT}
node=demo$$-node client=demo$$-client web=demo$$-web rival=demo$$-rival

# sysctl, and kill as a program, are of a package that a minimal Debian does not have
cleanup() {
    local running
    for namespace in "$node" "$client" "$web" "$rival"; do
        if [ -e "/run/netns/$namespace" ]; then
            mapfile -t running < <(ip netns pids "$namespace")
            [ ${#running[@]} -eq 0 ] || kill "${running[@]}" 2>/dev/null || true
            ip netns del "$namespace"
        fi
    done
}
trap cleanup EXIT
trap 'exit 1' INT TERM

title() { printf '\n\033[1m%s\033[0m\n' "$*"; }
[ -t 1 ] || title() { printf '\n== %s\n' "$*"; }

add_pod() { # NAMESPACE ADDRESS
    ip -n "$1" link set lo up
    ip -n "$node" link add "veth-${1##*-}" type veth peer name eth0 netns "$1"
    ip -n "$node" link set "veth-${1##*-}" master cni0 up
    ip -n "$1" addr add "$2/24" dev eth0
    ip -n "$1" link set eth0 up
    ip -n "$1" route add default via 10.88.0.1
}

cni() { # COMMAND NAMESPACE ADDRESS, as a container runtime calls a plugin
    printf '%s' "{\"cniVersion\": \"1.0.0\", \"name\": \"demo\", \"type\": \"hostport\", \"waitForHolder\": 0,
        \"runtimeConfig\": {\"portMappings\": [
            {\"hostPort\": 8080, \"containerPort\": 80, \"protocol\": \"tcp\"},
            {\"hostPort\": 0, \"containerPort\": 9090, \"protocol\": \"tcp\"}]},
        \"prevResult\": {\"cniVersion\": \"1.0.0\", \"ips\": [{\"address\": \"$3/24\"}]}}" |
        CNI_COMMAND=$1 CNI_CONTAINERID=${2##*-} CNI_NETNS=/run/netns/$2 CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin \
            CNI_ARGS="K8S_POD_NAMESPACE=demo;K8S_POD_NAME=${2##*-}" ip netns exec "$node" "$plugin"
}

get() { # NAMESPACE URL
    printf '$ curl %s\n' "$2"
    ip netns exec "$1" curl --noproxy '*' --silent --show-error --max-time 3 "$2" 2>&1 | sed 's/ after [0-9]* ms//' || true
}

for namespace in "$node" "$client" "$web" "$rival"; do ip netns add "$namespace"; done
ip -n "$node" link set lo up
ip -n "$node" link add uplink type veth peer name uplink netns "$client"
ip -n "$node" addr add 192.0.2.1/24 dev uplink
ip -n "$node" link set uplink up
ip -n "$client" addr add 192.0.2.2/24 dev uplink
ip -n "$client" link set uplink up
ip -n "$node" link add cni0 type bridge
ip -n "$node" addr add 10.88.0.1/24 dev cni0
ip -n "$node" link set cni0 up
ip netns exec "$node" sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
add_pod "$web" 10.88.0.2
add_pod "$rival" 10.88.0.3
ip netns exec "$web" /usr/bin/python3 -I -c '
import http.server
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(f"Hello {self.client_address[0]}, this is the pod.\n".encode())
    def log_message(self, *_): pass
http.server.HTTPServer(("", 80), Hello).serve_forever()' &
until ip netns exec "$web" curl --noproxy '*' -s -o /dev/null http://10.88.0.2/; do sleep 0.1; done

title "A pod starts with host ports 8080 and 0: the runtime calls ADD"
cni ADD "$web" 10.88.0.2

title "The ruleset of the node: 8080 leads to the pod, 0 means unspecified and maps nothing"
printf '$ nft list table inet hostport\n'
ip netns exec "$node" nft list table inet hostport

title "From outside, and from the node itself"
get "$client" http://192.0.2.1:8080/
get "$node" http://127.0.0.1:8080/

title "A second pod asks for 8080: it is refused, and says who holds the port"
cni ADD "$rival" 10.88.0.3 || true

title "The first pod stops: the runtime calls DEL"
cni DEL "$web" 10.88.0.2
get "$client" http://192.0.2.1:8080/

title "Done: the namespaces of this demonstration, and their rules, are gone"
