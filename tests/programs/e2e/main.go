// Command e2e runs upstream's conformance tests of host ports: package network has nothing but a copy of hostport.go
// of k8s.io/kubernetes/test/e2e/network, because the whole of test/e2e takes many minutes to build.
package main

import (
	"flag"
	"os"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"

	_ "k8s.io/component-base/logs/testinit"
	_ "tools/network"
)

// outcome is what RunSpecs also returns.
type outcome struct{}

func (outcome) Fail() {}

func main() {
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	framework.AfterReadingAllFlags(&framework.TestContext)
	gomega.RegisterFailHandler(framework.Fail)
	suite, reporter := framework.CreateGinkgoConfig()
	if !ginkgo.RunSpecs(outcome{}, "host ports", suite, reporter) {
		os.Exit(1)
	}
}
