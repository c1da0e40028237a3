package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
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
// the ratios to the first address.
func path(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("path", flag.ContinueOnError)
	rounds := flags.Int("rounds", 100, "how often")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var addresses []netip.AddrPort
	for _, text := range flags.Args() {
		address, err := netip.ParseAddrPort(text)
		if err != nil {
			return err
		}
		addresses = append(addresses, address)
	}
	kinds := []func(to string) error{connectBlock, requestBlock, datagramBlock}
	ratios := make([][][]float64, len(addresses)) // by address and kind
	for i := range ratios {
		ratios[i] = make([][]float64, len(kinds))
	}
	for round := range *rounds + 1 { // the first is not counted: neighbours and caches are cold
		for k, block := range kinds {
			took := make([]time.Duration, len(addresses))
			for _, i := range rand.Perm(len(addresses)) {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				began := time.Now()
				if err := block(addresses[i].String()); err != nil {
					return fmt.Errorf("%v: %w", addresses[i], err)
				}
				took[i] = time.Since(began)
			}
			for i := range addresses {
				if round > 0 {
					ratios[i][k] = append(ratios[i][k], float64(took[i])/float64(took[0]))
				}
			}
		}
	}
	out := json.NewEncoder(os.Stdout)
	for i, address := range addresses {
		var medians [3]float64
		for k := range medians {
			slices.Sort(ratios[i][k])
			medians[k] = ratios[i][k][len(ratios[i][k])/2]
		}
		if err := out.Encode(lab.Path{To: address, Connection: medians[0], Request: medians[1], Datagram: medians[2]}); err != nil {
			return err
		}
	}
	return nil
}

const patience = 5 * time.Second

// connectBlock makes connections, which end with a reset, so that no port is left in TIME_WAIT.
func connectBlock(to string) error {
	for range connections {
		conn, err := net.DialTimeout("tcp", to, patience)
		if err != nil {
			return err
		}
		if err := errors.Join(conn.(*net.TCPConn).SetLinger(0), conn.Close()); err != nil {
			return err
		}
	}
	return nil
}

func requestBlock(to string) error {
	conn, err := net.DialTimeout("tcp", to, patience)
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

func datagramBlock(to string) error {
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
