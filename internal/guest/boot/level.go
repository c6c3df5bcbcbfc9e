package boot

import (
	"errors"

	"github.com/sirupsen/logrus"
)

// SetLevel sets the level that agent.log asks for; without a name it stays.
func SetLevel(l *logrus.Logger, name string) {
	if level, err := parseLevel(name); err == nil {
		l.SetLevel(level)
	}
}

// parseLevel knows the protocol's names, which are those of other agents too:
// critical is one of ours by another name.
func parseLevel(name string) (logrus.Level, error) {
	if name == "critical" {
		name = "fatal"
	}
	level, err := logrus.ParseLevel(name)
	if err != nil {
		return 0, errors.New("not a log level")
	}
	return level, nil
}
