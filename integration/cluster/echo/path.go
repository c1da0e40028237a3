package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The exchanges of a block, which takes some milliseconds.
const (
	connections = 20
	exchanges   = 100
)

// path compares ways to one server: in each round a block of connections, of requests on one connection and of
// datagrams on one socket by each of the addresses, in random order. It prints a line of JSON for each, the medians of
// how long one exchange took, and of the ratios to the first address. An address may be the path of a Unix socket, which
// takes no datagrams.
func path(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("path", flag.ContinueOnError)
	rounds := flags.Int("rounds", 100, "how often")
	if err := flags.Parse(args); err != nil {
		return err
	}
	addresses := flags.Args()
	blocks := []struct {
		run       func(network, to string) error
		exchanges int
	}{{connectBlock, connections}, {requestBlock, exchanges}, {datagramBlock, exchanges}}
	took := make([][][]time.Duration, len(addresses)) // by address and kind, of one block
	for i := range took {
		took[i] = make([][]time.Duration, len(blocks))
	}
	for round := range *rounds + 1 { // the first is not counted: neighbours and caches are cold
		for k, block := range blocks {
			for _, i := range rand.Perm(len(addresses)) {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				network := "tcp"
				if strings.HasPrefix(addresses[i], "/") {
					network = "unix"
				}
				began := time.Now()
				if err := block.run(network, addresses[i]); err != nil {
					return fmt.Errorf("%v: %w", addresses[i], err)
				}
				if round > 0 {
					took[i][k] = append(took[i][k], time.Since(began))
				}
			}
		}
	}
	out := json.NewEncoder(os.Stdout)
	for i, address := range addresses {
		p := lab.Path{To: address}
		for k, e := range []*lab.Exchange{&p.Connection, &p.Request, &p.Datagram} {
			var ratios []float64
			for round, d := range took[i][k] {
				ratios = append(ratios, float64(d)/float64(took[0][k][round]))
			}
			e.Took, e.Ratio = median(took[i][k])/time.Duration(blocks[k].exchanges), median(ratios)
		}
		if strings.HasPrefix(address, "/") {
			p.Datagram = lab.Exchange{}
		}
		if err := out.Encode(p); err != nil {
			return err
		}
	}
	return nil
}

func median[T cmp.Ordered](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

const patience = 5 * time.Second

// connectBlock makes connections, which end with a reset, so that no port is left in TIME_WAIT.
func connectBlock(network, to string) error {
	for range connections {
		conn, err := net.DialTimeout(network, to, patience)
		if err != nil {
			return err
		}
		if tcp, is := conn.(*net.TCPConn); is {
			err = tcp.SetLinger(0)
		}
		if err := errors.Join(err, conn.Close()); err != nil {
			return err
		}
	}
	return nil
}

func requestBlock(network, to string) error {
	conn, err := net.DialTimeout(network, to, patience)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	reader := bufio.NewReader(conn)
	for range exchanges {
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: echo\r\n\r\n")); err != nil {
			return err
		}
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return err
		}
	}
	return nil
}

func datagramBlock(network, to string) error {
	if network == "unix" {
		return nil
	}
	conn, err := net.Dial("udp", to)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	buffer := make([]byte, 2048)
	for range exchanges {
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := conn.Write([]byte("1")); err != nil {
			return err
		}
		if _, err := conn.Read(buffer); err != nil {
			return err
		}
	}
	return nil
}
