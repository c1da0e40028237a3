package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The sockets here block, and client and servers have a thread each: package net would add its poller and the
// scheduling of goroutines to every exchange, which cost more than what is measured.

// warmUp is how many exchanges on a new socket are not counted: the first one makes the flow.
const warmUp = 5

// setupBlock measures connections: from connect(2) to the first byte of the server.
func setupBlock(server netip.AddrPort, exchanges int, took *sample) error {
	for range exchanges {
		started := time.Now()
		fd, err := connect(unix.SOCK_STREAM, server)
		if err != nil {
			return err
		}
		err = receive(fd)
		elapsed := time.Since(started)
		if err := errors.Join(err, unix.Close(fd)); err != nil {
			return err
		}
		took.add(elapsed, time.Microsecond)
	}
	return nil
}

// requestBlock measures exchanges on one connection.
func requestBlock(server netip.AddrPort, exchanges int, took *sample) error {
	fd, err := connect(unix.SOCK_STREAM, server)
	if err != nil {
		return err
	}
	if err := receive(fd); err != nil { // the greeting
		return errors.Join(err, unix.Close(fd))
	}
	return errors.Join(exchange(fd, exchanges, took), unix.Close(fd))
}

// datagramBlock measures exchanges on one connected socket.
func datagramBlock(server netip.AddrPort, exchanges int, took *sample) error {
	fd, err := connect(unix.SOCK_DGRAM, server)
	if err != nil {
		return err
	}
	return errors.Join(exchange(fd, exchanges, took), unix.Close(fd))
}

func exchange(fd, exchanges int, took *sample) error {
	for i := range warmUp + exchanges {
		started := time.Now()
		if err := send(fd); err != nil {
			return err
		}
		if err := receive(fd); err != nil {
			return err
		}
		if elapsed := time.Since(started); i >= warmUp {
			took.add(elapsed, time.Microsecond)
		}
	}
	return nil
}

// connect opens a socket in the network namespace of this thread. Closing it resets the connection.
func connect(kind int, server netip.AddrPort) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	// A server that has died is not waited for.
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience.Seconds())})
	if kind == unix.SOCK_STREAM {
		err = errors.Join(err,
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
			unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	}
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: server.Addr().As4(), Port: int(server.Port())})
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("connect: %w", err), unix.Close(fd))
	}
	return fd, nil
}

func send(fd int) error {
	_, err := unix.Write(fd, []byte{1})
	return err
}

// receive waits for one byte; io.EOF where the peer has closed.
func receive(fd int) error {
	var buffer [1]byte
	for {
		size, err := unix.Read(fd, buffer[:])
		switch {
		case errors.Is(err, unix.EINTR): // a signal of the Go runtime: signal(7), where there is a time-out
		case err == nil && size == 0:
			return io.EOF
		default:
			return err
		}
	}
}

// servers answer one byte with one byte, by TCP and by UDP, each on a thread of its own.
type servers struct {
	tcp, udp int
	running  sync.WaitGroup
}

func startServers(node *lab.Node, namespace string, processor int) (*servers, error) {
	s := &servers{}
	err := node.In(namespace, func() (err error) {
		if s.tcp, err = listen(unix.SOCK_STREAM); err != nil {
			return err
		}
		if s.udp, err = listen(unix.SOCK_DGRAM); err != nil {
			return errors.Join(err, unix.Close(s.tcp))
		}
		return unix.Listen(s.tcp, 16)
	})
	if err != nil {
		return nil, fmt.Errorf("listening in %s: %w", namespace, err)
	}
	s.start(processor, func() { serveTCP(s.tcp) })
	s.start(processor, func() { serveUDP(s.udp) })
	return s, nil
}

func (s *servers) start(processor int, serve func()) {
	s.running.Go(func() {
		runtime.LockOSThread() // for good: the thread ends with the server
		// The processor is one of those that this process may use.
		_ = onProcessor(processor, func() error { serve(); return nil })
	})
}

func listen(kind int) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0); err != nil {
		return 0, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: serverPort}); err != nil {
		return 0, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// serveTCP serves one connection after the other: it greets with a byte, and then answers.
func serveTCP(listener int) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINVAL): // shut down
			return
		case err != nil: // the client will say what is wrong
			continue
		}
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		for err == nil {
			if err = send(fd); err == nil {
				err = receive(fd)
			}
		}
		_ = unix.Close(fd)
	}
}

func serveUDP(fd int) {
	var buffer [1]byte
	for {
		_, from, err := unix.Recvfrom(fd, buffer[:], 0)
		switch {
		case err == nil && from == nil: // shut down
			return
		case err == nil:
			_ = unix.Sendto(fd, buffer[:], 0, from)
		}
	}
}

// close ends the servers. Clients have closed their sockets before.
func (s *servers) close() error {
	err := unix.Shutdown(s.tcp, unix.SHUT_RDWR)
	// It wakes the server, and complains that the socket is not connected.
	_ = unix.Shutdown(s.udp, unix.SHUT_RDWR)
	s.running.Wait()
	return errors.Join(err, unix.Close(s.tcp), unix.Close(s.udp))
}
