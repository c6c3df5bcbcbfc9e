package e2e

import (
	"bufio"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestE2EMetrics(tt *testing.T) {
	each(tt, func(t *test) {
		id := t.spawn(nil, "sh", "-c", "head -c 16777216 /dev/zero | md5sum; sleep 1000")
		t.eventually("there are metrics", func() bool {
			m := t.ctr("task", "metrics", id)
			return strings.Contains(m, id) && strings.Contains(m, "memory.usage") || strings.Contains(m, "usage_in_bytes")
		})
	})
}

func TestE2EMemoryLimit(tt *testing.T) {
	once(tt, func(t *test) {
		events := t.watch()
		// A process of the container that takes all it gets: tail keeps the
		// last line, which never ends.
		r := t.try("", runArgs([]string{"--rm", "--memory-limit", "67108864"}, t.id(""), "tail", "/dev/zero")...)
		t.equal("exit code", r.code, 137)
		events.sees("/tasks/exit", t.ids[0])
		events.sees("/tasks/oom", t.ids[0])
	})
}

// A limit above what a machine has by default makes the machine larger.
func TestE2EMachineFollowsLimit(tt *testing.T) {
	once(tt, func(t *test) {
		needMachine(t)
		r := t.try("", runArgs([]string{"--rm", "--memory-limit", "536870912"}, t.id(""), "dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1")...)
		t.equal("exit code", r.code, 0)
	})
}

func TestE2EEvents(tt *testing.T) {
	each(tt, func(t *test) {
		events := t.watch()
		id := t.spawn(nil, "sleep", "1000")
		t.exec(id, "true")
		t.ctr("task", "pause", id)
		t.ctr("task", "resume", id)
		t.ctr("task", "kill", "-s", "SIGKILL", id)
		t.eventually("the task is stopped", func() bool { return t.status(id) == "STOPPED" })
		t.deleteTask(id)
		want := []string{
			"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit",
			"/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete",
		}
		t.eventually("all events", func() bool { return len(events.topics(id)) >= len(want) })
		t.equal("events", strings.Join(events.topics(id), " "), strings.Join(want, " "))
	})
}

// A watcher is 'ctr events'.
type watcher struct {
	t     *test
	mu    sync.Mutex
	lines []string // guarded by mu
}

func (t *test) watch() *watcher {
	t.Helper()
	w := &watcher{t: t}
	cmd := t.Ctr(t.Context(), "events")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(out); s.Scan(); {
			w.mu.Lock()
			w.lines = append(w.lines, s.Text())
			w.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-read
		_ = cmd.Wait()
	})
	// It does not say when it has subscribed: an event of our own tells.
	t.eventually("events arrive", func() bool {
		t.ctr("namespaces", "label", "default", "watch=1")
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.lines) > 0
	})
	return w
}

// topics are those of a container's task, in order. A line is
//
//	2026-11-23 16:00:00.000000000 +0000 UTC default /tasks/start {"container_id":"x","pid":7}
func (w *watcher) topics(id string) (topics []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, line := range w.lines {
		_, rest, ok := strings.Cut(line, " /tasks/")
		if !ok || !strings.Contains(rest, `"container_id":"`+id+`"`) {
			continue
		}
		topic, _, _ := strings.Cut(rest, " ")
		topics = append(topics, "/tasks/"+topic)
	}
	return topics
}

func (w *watcher) sees(topic, id string) {
	w.t.Helper()
	w.t.eventually(topic+" of "+id, func() bool { return slices.Contains(w.topics(id), topic) })
}
