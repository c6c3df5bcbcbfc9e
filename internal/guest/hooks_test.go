package guest

import (
	"os"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runc/libcontainer/configs"
)

func TestFindHooks(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, map[string]string{
		"prestart/20": "", "prestart/10": "", "prestart/readme": "", "prestart/sub/": "", "poststop/30": "", "startContainer/5": "",
		"elsewhere/1": "", "prestart/15": "->10", "prestart/16": "->nowhere",
	})
	for _, name := range []string{"prestart/20", "prestart/10", "poststop/30", "startContainer/5", "elsewhere/1"} {
		if err := os.Chmod(dir+"/"+name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	hooks, err := findHooks(dir)
	if err != nil {
		t.Fatal(err)
	}
	paths := func(list configs.HookList) string {
		var s []string
		for _, h := range list {
			s = append(s, strings.TrimPrefix(h.(configs.CommandHook).Path, dir+"/"))
		}
		return strings.Join(s, " ")
	}
	command := func(path string) configs.HookList {
		return configs.HookList{configs.NewCommandHook(&configs.Command{Path: path})}
	}
	spec := configs.Hooks{
		configs.Prestart: command("p"), configs.StartContainer: command("s"), configs.Poststart: command("after"),
	}
	own := splitHooks(spec, hooks)
	for _, tt := range []struct {
		hooks configs.Hooks
		stage configs.HookName
		want  string
	}{
		{spec, configs.Prestart, "p prestart/10 prestart/15 prestart/20"},
		{spec, configs.StartContainer, "s"}, // in the container
		{spec, configs.Poststart, ""},
		{spec, configs.Poststop, "poststop/30"},
		{own, configs.Prestart, ""},
		{own, configs.StartContainer, "startContainer/5"},
		{own, configs.Poststart, "after"},
	} {
		if got := paths(tt.hooks[tt.stage]); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.stage, got, tt.want)
		}
	}
	if hooks, err := findHooks(""); hooks != nil || err != nil {
		t.Errorf("%v, %v", hooks, err)
	}
	for _, bad := range []string{dir + "/none", dir + "/prestart/10"} {
		if _, err := findHooks(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
