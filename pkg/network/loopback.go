package network

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// Nothing of a pod listens in its network namespace on the host: that is in the
// guest. But engines connect there, to forward a port. The kernel asks a program
// of type sk_lookup which socket a connection is for (Linux 5.9): here it is one
// listener, whatever address and port was meant. The accepted connection has
// these as its own. Unlike rules of a firewall, all of this goes with the
// process.

// A Catcher is a listener for every TCP connection inside the namespace.
type Catcher struct {
	*net.TCPListener
	attached link.Link
}

// Catch takes every TCP connection made inside the namespace from now on.
func (n *Namespace) Catch(ctx context.Context) (*Catcher, error) {
	l, err := n.listen(ctx)
	if err != nil {
		return nil, fmt.Errorf("listen in network namespace: %w", err)
	}
	attached, err := n.steer(l)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("steer connections to a listener: %w", err), l.Close())
	}
	return &Catcher{l, attached}, nil
}

// Close lets connections go where they went before. Those that were accepted
// stay.
func (c *Catcher) Close() error { return errors.Join(c.attached.Close(), c.TCPListener.Close()) }

func (n *Namespace) listen(ctx context.Context) (l *net.TCPListener, _ error) {
	err := n.inside(func() error {
		var cfg net.ListenConfig
		cfg.SetMultipathTCP(false) // its sockets can't be steered to
		any, err := cfg.Listen(ctx, "tcp", "[::]:0")
		if err != nil { // no IPv6
			any, err = cfg.Listen(ctx, "tcp", "0.0.0.0:0")
		}
		if err != nil {
			return err
		}
		l = any.(*net.TCPListener)
		return nil
	})
	return l, err
}

// steer attaches the program. It and the map live as long as the link.
func (n *Namespace) steer(l *net.TCPListener) (attached link.Link, err error) {
	sockets, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return nil, err
	}
	defer sockets.Close()
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	var perr error
	if err := raw.Control(func(fd uintptr) { perr = sockets.Put(uint32(0), uint64(fd)) }); err != nil {
		return nil, err
	}
	if perr != nil {
		return nil, perr
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "Apache-2.0", Instructions: assign(sockets.FD()),
	})
	if err != nil {
		return nil, err
	}
	defer program.Close()
	err = n.control(func(fd int) (err error) {
		attached, err = link.AttachNetNs(fd, program)
		return err
	})
	return attached, err
}

// assign is the program: the socket in the map, if the kernel finds it suitable
// (it has to be of the same protocol and family); all may pass.
func assign(sockets int) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1), // struct bpf_sk_lookup
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, sockets),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.FnSkRelease.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"), // SK_PASS
		asm.Return(),
	}
}
