package plain

import (
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
)

// A Program is what a process does, by its arguments.
type Program func(args []string, stdin io.Reader, stdout, stderr io.Writer) (status int)

// A Server is an agent that knows the plain protocol: one sandbox, containers
// and processes, streams by calls. It behaves as the protocol's reference does,
// also where that is inconvenient.
type Server struct {
	// Program is what every process runs.
	Program Program
	// Rust makes it answer unknown methods as ttrpc in Rust does.
	Rust bool
	// Missing are methods that it does not know.
	Missing []string
	// Before is called before the answer to a method leaves, when set.
	Before func(method string, req Fields)

	jobs sync.WaitGroup

	mu         sync.Mutex
	sandbox    bool                  // guarded by mu
	containers map[string]*container // guarded by mu
	calls      []Call                // guarded by mu
	ended      chan struct{}         // closed by Close
	conns      []net.Conn            // guarded by mu
}

// A Call is a request that has arrived.
type Call struct {
	Method string
	Req    Fields
}

type container struct {
	args      []string
	started   bool
	processes map[string]*process
}

// A process has pipes for streams, as a real one has.
type process struct {
	in, out, err [2]*os.File // read and write end
	kill         chan struct{}
	killed       sync.Once
	done         chan struct{} // closed when status is set
	status       uint64
	waited       bool // guarded by the server's mu
}

// NewServer makes one whose processes are program.
func NewServer(program Program) *Server {
	return &Server{Program: program, containers: map[string]*container{}, ended: make(chan struct{})}
}

// Close ends the server and everything in it, and waits for that.
func (s *Server) Close() {
	close(s.ended)
	s.mu.Lock()
	for _, c := range s.conns {
		_ = c.Close()
	}
	for _, c := range s.containers {
		c.end()
	}
	s.mu.Unlock()
	s.jobs.Wait()
}

// Calls are the requests for a method so far.
func (s *Server) Calls(method string) []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.calls), func(c Call) bool { return c.Method != method })
}

// Serve answers on a connection in the background.
func (s *Server) Serve(conn net.Conn) {
	s.mu.Lock()
	s.conns = append(s.conns, conn)
	s.mu.Unlock()
	var writing sync.Mutex
	s.jobs.Go(func() {
		defer conn.Close()
		for {
			f, err := readFrame(conn)
			if err != nil || f.kind != request {
				return
			}
			s.jobs.Go(func() { // answers leave in any order
				body := s.answer(f.body)
				writing.Lock()
				defer writing.Unlock()
				_, _ = conn.Write(frame{f.stream, response, body}.bytes())
			})
		}
	})
}

// answer is the whole response to a request.
func (s *Server) answer(body []byte) Msg {
	var answer Msg
	f, err := Decode(body)
	if err == nil {
		service, method := f.Str(1), f.Str(2)
		var req Fields
		if req, err = Decode([]byte(f.Str(3))); err == nil {
			answer, err = s.call(service, method, req)
		}
		if s.Before != nil {
			s.Before(method, req)
		}
	}
	if err == nil {
		return Msg{}.Sub(2, answer)
	}
	st, ok := err.(*Status) //nolint:errorlint // made here, never wrapped
	if !ok {
		st = &Status{Internal, err.Error()}
	}
	return Msg{}.Sub(1, Msg{}.Int(1, st.Code).Str(2, st.Text))
}

func (s *Server) call(service, method string, req Fields) (Msg, error) {
	s.mu.Lock()
	s.calls = append(s.calls, Call{method, req})
	s.mu.Unlock()
	handlers := map[string]func(Fields) (Msg, error){}
	switch service {
	case Health:
		handlers = map[string]func(Fields) (Msg, error){
			"Check":   func(Fields) (Msg, error) { return Msg{}.Int(1, 1), nil },
			"Version": func(Fields) (Msg, error) { return Msg{}.Str(1, "0.0.1").Str(2, "4.1.0"), nil },
		}
	case Agent:
		handlers = map[string]func(Fields) (Msg, error){
			"CreateSandbox": s.createSandbox, "DestroySandbox": s.destroySandbox,
			"CreateContainer": s.createContainer, "StartContainer": s.startContainer, "RemoveContainer": s.removeContainer,
			"ExecProcess": s.execProcess, "WaitProcess": s.waitProcess, "SignalProcess": s.signalProcess,
			"WriteStdin": s.writeStdin, "CloseStdin": s.closeStdin,
			"ReadStdout":      func(r Fields) (Msg, error) { return s.read(r, func(p *process) *os.File { return p.out[0] }) },
			"ReadStderr":      func(r Fields) (Msg, error) { return s.read(r, func(p *process) *os.File { return p.err[0] }) },
			"GetGuestDetails": s.details, "StatsContainer": s.stats,
			"SetGuestDateTime": none, "ReseedRandomDev": none, "CopyFile": none, "TtyWinResize": none, "UpdateContainer": none,
			"PauseContainer": none, "ResumeContainer": none,
			"UpdateInterface": func(r Fields) (Msg, error) { return r.last(1).Bytes, nil },
			"UpdateRoutes":    func(r Fields) (Msg, error) { return r.last(1).Bytes, nil },
			"GetOOMEvent":     func(Fields) (Msg, error) { <-s.ended; return nil, &Status{Internal, "over"} },
		}
	}
	h := handlers[method]
	if h == nil || slices.Contains(s.Missing, method) {
		if s.Rust {
			return nil, &Status{InvalidArgument, "/" + service + "/" + method + " does not exist"}
		}
		return nil, &Status{Unimplemented, "method " + method}
	}
	return h(req)
}

func none(Fields) (Msg, error) { return nil, nil }

func (s *Server) createSandbox(Fields) (Msg, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sandbox {
		return nil, &Status{AlreadyExists, "sandbox"}
	}
	s.sandbox = true
	return nil, nil
}

func (s *Server) destroySandbox(Fields) (Msg, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, c := range s.containers {
		c.end()
		delete(s.containers, id)
	}
	return nil, nil
}

func (s *Server) createContainer(r Fields) (Msg, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := r.Str(1)
	if !s.sandbox || s.containers[id] != nil {
		return nil, &Status{AlreadyExists, "container " + id + ", or no sandbox"}
	}
	// spec 6 {process 2 {args 4}}
	c := &container{args: r.Sub(6).Sub(2).Strs(4), processes: map[string]*process{}}
	p, err := newProcess()
	if err != nil {
		return nil, err
	}
	c.processes[r.Str(2)] = p
	s.containers[id] = c
	return nil, nil
}

func (s *Server) startContainer(r Fields) (Msg, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.Str(1)]
	if c == nil || c.started {
		return nil, &Status{NotFound, "container " + r.Str(1)}
	}
	c.started = true
	s.start(c.processes[r.Str(1)], c.args)
	return nil, nil
}

func (s *Server) removeContainer(r Fields) (Msg, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.Str(1)]
	if c == nil {
		return nil, &Status{NotFound, "container " + r.Str(1)}
	}
	c.end()
	delete(s.containers, r.Str(1))
	return nil, nil
}

func (s *Server) execProcess(r Fields) (Msg, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.Str(1)]
	if c == nil {
		return nil, &Status{NotFound, "container " + r.Str(1)}
	}
	p, err := newProcess()
	if err != nil {
		return nil, err
	}
	c.processes[r.Str(2)] = p
	s.start(p, r.Sub(4).Strs(4))
	return nil, nil
}

func (s *Server) waitProcess(r Fields) (Msg, error) {
	p, err := s.process(r)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-s.ended:
		return nil, &Status{Internal, "over"}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.waited = true // the first wait that completes takes the process away
	return Msg{}.Int(1, p.status), nil
}

func (s *Server) signalProcess(r Fields) (Msg, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[r.Str(1)]
	if c == nil {
		return nil, &Status{NotFound, "container " + r.Str(1)}
	}
	id := r.Str(2)
	if id == "" && r.Int(3) == 9 {
		c.kill()
		return nil, nil
	}
	if id == "" {
		id = r.Str(1)
	}
	p := c.processes[id]
	if p == nil || p.waited {
		return nil, &Status{NotFound, "process " + id}
	}
	p.end()
	return nil, nil
}

func (s *Server) writeStdin(r Fields) (Msg, error) {
	p, err := s.process(r)
	if err != nil {
		return nil, err
	}
	if r.Str(3) == "" {
		return nil, p.in[1].Close()
	}
	n, err := p.in[1].WriteString(r.Str(3))
	return Msg{}.Int(1, uint64(n)), err
}

func (s *Server) closeStdin(r Fields) (Msg, error) {
	p, err := s.process(r)
	if err != nil {
		return nil, err
	}
	_ = p.in[1].Close()
	return nil, nil
}

func (s *Server) read(r Fields, which func(*process) *os.File) (Msg, error) {
	p, err := s.process(r)
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(r.Int(3), 1<<20))
	n, _ := which(p).Read(b) // whatever went wrong, there is no more
	return Msg{}.Str(1, string(b[:n])), nil
}

func (s *Server) details(Fields) (Msg, error) {
	// agent_details 2 {version 1, storage_handlers 4}
	return Msg{}.Int(1, 128<<20).Sub(2, Msg{}.Str(1, "4.1.0").Str(4, "blk", "virtio-fs")), nil
}

func (s *Server) stats(Fields) (Msg, error) {
	// cgroup_stats 1 {pids_stats 3 {current 1}}, and fields of a later version.
	return Msg{}.Sub(1, Msg{}.Sub(3, Msg{}.Int(1, 7).Int(4000, 1)).Str(5000, "new")).Str(6000, "newer"), nil
}

func (s *Server) process(r Fields) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[r.Str(1)]; c != nil {
		if p := c.processes[r.Str(2)]; p != nil && !p.waited {
			return p, nil
		}
	}
	return nil, &Status{NotFound, fmt.Sprintf("process %q of container %q", r.Str(2), r.Str(1))}
}

func newProcess() (*process, error) {
	p := &process{kill: make(chan struct{}), done: make(chan struct{})}
	for _, ends := range []*[2]*os.File{&p.in, &p.out, &p.err} {
		var err error
		if ends[0], ends[1], err = os.Pipe(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// start runs the program until it returns or is killed.
func (s *Server) start(p *process, args []string) {
	s.jobs.Go(func() {
		ended := make(chan int, 1)
		s.jobs.Go(func() { ended <- s.Program(args, p.in[0], p.out[1], p.err[1]) })
		select {
		case status := <-ended:
			p.status = uint64(status)
		case <-p.kill:
			p.status = 137
		}
		for _, f := range []*os.File{p.in[0], p.out[1], p.err[1]} {
			_ = f.Close()
		}
		close(p.done)
	})
}

func (p *process) end() { p.killed.Do(func() { close(p.kill) }) }

func (c *container) kill() {
	for _, p := range c.processes {
		p.end()
	}
}

// end kills and lets nobody wait for what will not come.
func (c *container) end() {
	c.kill()
	for _, p := range c.processes {
		for _, ends := range [][2]*os.File{p.in, p.out, p.err} {
			_, _ = ends[0].Close(), ends[1].Close()
		}
	}
}
