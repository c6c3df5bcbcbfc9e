package boot

import "github.com/sirupsen/logrus"

// setLevel sets the level that agent.log asks for. The protocol's names are
// those of other agents too: critical is one of ours by another name.
func setLevel(l *logrus.Logger, name string) {
	if name == "critical" {
		name = "fatal"
	}
	if level, err := logrus.ParseLevel(name); err == nil {
		l.SetLevel(level)
	}
}
